"""insight-face-paddle's Python use, `import insightface_paddle as face`: see deploy.demo."""

from deploy.demo import InsightFace, main, parser
from runtime.log import run_command

__all__ = ["InsightFace", "parser"]

if __name__ == "__main__":
    run_command(main)
