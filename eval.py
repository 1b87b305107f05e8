"""arcface_torch's name for evaluate.py: python eval.py --pth_path=backbone.pth --data_path=FOLDER"""

from evaluate import main
from runtime.log import run_command

if __name__ == "__main__":
    run_command(main)
