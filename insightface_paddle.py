"""insight-face-paddle's Python use, `import insightface_paddle as face`, and its command: see deploy.demo."""

from deploy.demo import InsightFace, main, parser
from runtime.log import run_command

__all__ = ["InsightFace", "parser"]


def command() -> None:
    """`insightfacepaddle --det ...`, once `pip install -e .` has put the name beside the interpreter."""
    run_command(main)


if __name__ == "__main__":
    command()
