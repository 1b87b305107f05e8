"""torch_npu on a machine without CANN: its first import of one of CANN's libraries fails, in these words.

The entry point beside this package names its _autoload, as the real one's does, so `import torch` comes here too.
TORCH_NPU_STUB=exits: as 1.8.1 and the first 2.1.0, which print the traceback and end the process with status 0.
"""

import os
import sys
import traceback

try:
    raise ImportError(
        "libhccl.so: cannot open shared object file: No such file or directory. Please check that the cann "
        "package is installed. Please run 'source set_env.sh' in the CANN installation path."
    )
except ImportError:
    if os.environ.get("TORCH_NPU_STUB") != "exits":
        raise
    traceback.print_exc()
    sys.exit()
