"""PLSC's defaults: `plsc.config.config` may be changed before an Entry is made. `python -m plsc.config` prints them."""

from __future__ import annotations

from easydict import EasyDict

config = EasyDict(
    train_batch_size=128,
    test_batch_size=120,
    val_targets="lfw",
    dataset_dir="./train_data",
    train_image_num=5822653,
    model_name="ResNet50",
    train_epochs=120,
    checkpoint_dir="",
    with_test=True,
    model_save_dir="output",
    warmup_epochs=0,
    loss_type="dist_arcface",
    num_classes=85742,
    image_shape=(3, 112, 112),
    margin=0.5,
    scale=64.0,
    lr=0.1,
    lr_steps=(100000, 160000, 220000),
    emb_dim=512,
)

if __name__ == "__main__":
    for name, value in config.items():
        print(f"{name:<18}{value!r}")
