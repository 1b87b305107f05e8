"""torch_npu on a machine without CANN: its first import of one of CANN's libraries fails, in these words.

The entry point beside this package names its _autoload, as the real one's does, so `import torch` comes here too.
"""

raise ImportError(
    "libhccl.so: cannot open shared object file: No such file or directory. Please check that the cann "
    "package is installed. Please run 'source set_env.sh' in the CANN installation path."
)
