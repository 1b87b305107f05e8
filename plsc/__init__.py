"""The interface of PaddlePaddle's PLSC over this project."""
