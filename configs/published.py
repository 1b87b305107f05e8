"""Recipes of other projects with what they published for them.

Each row names its source, hardware, batch, schedule, wall time and accuracy as far as its authors tell; what they do
not tell is not here. "last step" is the last verification of the public training log, which the log's best may exceed.
Accuracies are of those projects' own runs: this program trains by the same settings, and has not repeated them.
"""

from __future__ import annotations

from dataclasses import dataclass

from config import Config, replace


@dataclass(frozen=True)
class Published:
    """source: project and file. hardware: as it says. ranks: how many share `config.batch_size`. wall: of the whole
    training. accuracy: in the source's own words and protocol; "none published" where there is none."""

    config: Config
    source: str
    hardware: str
    ranks: int
    data: str
    wall: str
    accuracy: str

    @property
    def per_rank(self) -> int:
        return self.config.batch_size // self.config.accumulate // self.ranks


GPUS = "8 GPUs (which kind the log does not say)"
TARGETS = ("lfw", "cfp_fp", "agedb_30")
SETS = {  # identities, images
    "CASIA": "CASIA: 10,572 identities, 490,623 images",
    "MS1MV2": "MS1MV2: 85,742 identities, 5,822,653 images",
    "MS1MV3": "MS1MV3: 93,431 identities, 5,179,510 images",
    "Glint360K": "Glint360K: 360,232 identities, 17,091,657 images",
    "WF4M": "WebFace4M: 205,990 identities, 4,235,242 images",
    "WF12M": "WebFace12M: 617,970 identities, 12,720,066 images",
    "WF42M": "WebFace42M: 2,059,906 identities, 42,474,557 images",
}

# arcface_torch, configs/base.py and train_v2.py: decay of everything with batch norms and centers, the backbone's
# gradient clipped at 5, the rate falling to 0 in a straight line by the step, fp16 with a quickly growing scale.
arcface_torch = Config(
    net_mode="iresnet",
    net_depth=50,
    loss_type="arcface_straight_through",
    margin=0.5,
    centers_norm=0.2263,  # 0.01 * sqrt(512)
    update_rows="all",
    data_mode="",
    val_targets=TARGETS,
    epochs=20,
    batch_size=128 * 8,
    lr=0.1,
    lr_schedule="polynomial",
    lr_power=1.0,
    weight_decay=5e-4,
    decay_norms=True,
    clip_grad_norm=5.0,
    opt_level="O1",
    loss_scale="dynamic",
    incr_every_n_steps=100,
    decr_every_n_nan_or_inf=1,
    seed=2048,
)
_cosface = dict(loss_type="cosface", margin=0.4)
_r100 = dict(net_depth=100)
_mbf = dict(net_mode="mbf", weight_decay=1e-4)


def _of(name: str, data: str, wall: str, accuracy: str, ranks: int = 8, hardware: str = GPUS, **changes) -> Published:
    source = f"arcface_torch, configs/{name}.py"
    return Published(replace(arcface_torch, **changes), source, hardware, ranks, SETS[data], wall, accuracy)


_NONE = "none published"
_GLINT = dict(_cosface, weight_decay=1e-4)
_WF42M = dict(_cosface, sample_rate=0.2)
_ARCFACE_TORCH = {
    "ms1mv2_mbf": _of(
        "ms1mv2_mbf", "MS1MV2", "8.1 h", "IJB-C 1e-4 93.61, MFR-ALL 62.07; last step LFW 99.717 CFP-FP 95.586 "
        "AgeDB 97.050", **_mbf, epochs=40,
    ),
    "ms1mv2_r50": _of(
        "ms1mv2_r50", "MS1MV2", "7.2 h", "IJB-C 1e-4 95.97, MFR-ALL 75.13; last step LFW 99.783 CFP-FP 97.943 "
        "AgeDB 98.250",
    ),
    "ms1mv2_r100": _of(
        "ms1mv2_r100", "MS1MV2", "11.7 h", "IJB-C 1e-4 96.37, MFR-ALL 78.12; last step LFW 99.750 CFP-FP 98.529 "
        "AgeDB 98.167", **_r100,
    ),
    "ms1mv3_mbf": _of(
        "ms1mv3_mbf", "MS1MV3", "7.6 h", "IJB-C 1e-4 94.23, MFR-ALL 63.78; last step LFW 99.683 CFP-FP 97.143 "
        "AgeDB 97.400", **_mbf, epochs=40,
    ),
    "ms1mv3_r50": _of(
        "ms1mv3_r50", "MS1MV3", "6.5 h", "IJB-C 1e-4 96.37, MFR-ALL 79.14; last step LFW 99.833 CFP-FP 98.543 "
        "AgeDB 98.167",
    ),
    "ms1mv3_r100": _of(
        "ms1mv3_r100", "MS1MV3", "10.5 h", "IJB-C 1e-4 96.85, MFR-ALL 81.97; last step LFW 99.817 CFP-FP 98.929 "
        "AgeDB 98.550", **_r100,
    ),
    "ms1mv3_r50_onegpu": _of(
        "ms1mv3_r50_onegpu", "MS1MV3", "not published", _NONE, ranks=1, hardware="1 GPU", batch_size=128, lr=0.02
    ),
    "glint360k_mbf": _of(
        "glint360k_mbf", "Glint360K", "9.0 h in a run of batch 4,096", "IJB-C 1e-4 95.04, MFR-ALL 70.18",
        **{**_GLINT, **_mbf},
    ),
    "glint360k_r50": _of("glint360k_r50", "Glint360K", "not published", "IJB-C 1e-4 97.16, MFR-ALL 86.34", **_GLINT),
    "glint360k_r100": _of(
        "glint360k_r100", "Glint360K", "not published", "IJB-C 1e-4 97.55, MFR-ALL 89.52", **_GLINT, **_r100
    ),
    "wf4m_mbf": _of(
        "wf4m_mbf", "WF4M", "3.1 h", "last step LFW 99.567 CFP-FP 97.214 AgeDB 95.550", **_cosface, **_mbf
    ),
    "wf4m_r50": _of("wf4m_r50", "WF4M", "5.5 h", "last step LFW 99.800 CFP-FP 99.214 AgeDB 97.900", **_cosface),
    "wf4m_r100": _of(
        "wf4m_r100", "WF4M", "8.8 h", "IJB-C 1e-4 97.19, MFR-ALL 89.87; last step LFW 99.833 CFP-FP 99.357 "
        "AgeDB 97.883", **_cosface, **_r100,
    ),
    "wf12m_mbf": _of("wf12m_mbf", "WF12M", "not published", _NONE, **_cosface, **_mbf),
    "wf12m_r50": _of("wf12m_r50", "WF12M", "not published", _NONE, **_cosface),
    "wf12m_r100": _of(
        "wf12m_r100", "WF12M", "not published", "IJB-C 1e-4 97.59, MFR-ALL 94.69", **_cosface, **_r100
    ),
    "wf12m_pfc02_r100": _of(
        "wf12m_pfc02_r100", "WF12M", "not published", "IJB-C 1e-4 97.60, MFR-ALL 94.75", **_WF42M, **_r100
    ),
    "wf42m_pfc02_8gpus_r50_bs4k": _of(
        "wf42m_pfc02_8gpus_r50_bs4k", "WF42M", "40.7 h", "IJB-C 1e-4 97.53, MFR-ALL 93.83; last step LFW 99.817 "
        "CFP-FP 99.271 AgeDB 98.267", **_WF42M, batch_size=4096, lr=0.4, warmup_epochs=2.0,
    ),
    "wf42m_pfc02_16gpus_r50_bs8k": _of(
        "wf42m_pfc02_16gpus_r50_bs8k", "WF42M", "22.8 h", "IJB-C 1e-4 97.46, MFR-ALL 93.96; last step LFW 99.817 "
        "CFP-FP 99.243 AgeDB 98.083", 16, "16 GPUs", **_WF42M, batch_size=8192, lr=0.6, warmup_epochs=4.0,
    ),
    "wf42m_pfc02_32gpus_r50_bs4k": _of(
        "wf42m_pfc02_32gpus_r50_bs4k", "WF42M", "about 17,000 images/s", "IJB-C 1e-4 97.48, MFR-ALL 94.04", 32,
        "32 GPUs", **_WF42M, batch_size=4096, lr=0.4, warmup_epochs=2.0,
    ),
    "wf42m_pfc02_r100": _of(
        "wf42m_pfc02_r100", "WF42M", "not published", "IJB-C 1e-4 97.70, MFR-ALL 96.27", **_WF42M, **_r100
    ),
    "wf42m_pfc02_r100_16gpus": _of(
        "wf42m_pfc02_r100_16gpus", "WF42M", "about 5,200 images/s", "IJB-C 1e-4 97.80, MFR-ALL 96.28", 16, "16 GPUs",
        **_WF42M, **_r100, batch_size=2048, lr=0.2, warmup_epochs=2.0,
    ),
    "wf42m_pfc02_16gpus_r100": _of(
        "wf42m_pfc02_16gpus_r100", "WF42M", "48.8 h", "IJB-C 1e-4 97.85, MFR-ALL 96.69; last step LFW 99.833 "
        "CFP-FP 99.400 AgeDB 98.650", 16, "16 GPUs", **_WF42M, **_r100, batch_size=4096, lr=0.3, warmup_epochs=1.0,
    ),
    "wf42m_pfc02_r100_32gpus": _of(
        "wf42m_pfc02_r100_32gpus", "WF42M", "about 9,800 images/s", "IJB-C 1e-4 97.83, MFR-ALL 96.57", 32, "32 GPUs",
        **_WF42M, **_r100, batch_size=4096, lr=0.4, warmup_epochs=2.0,
    ),
    "wf42m_pfc02_16gpus_mbf_bs8k": _of(
        "wf42m_pfc02_16gpus_mbf_bs8k", "WF42M", "12.9 h", _NONE, 16, "16 GPUs", **_WF42M, **_mbf, batch_size=8192,
        lr=0.4, warmup_epochs=2.0,
    ),
    **{
        f"wf42m_pfc03_32gpu_r{depth}": _of(
            f"wf42m_pfc03_32gpu_r{depth}", "WF42M", "not published", f"IJB-C 1e-4 {ijb}, MFR-ALL {mfr}", 32, "32 GPUs",
            **_cosface, net_depth=depth, sample_rate=0.3, batch_size=4096, lr=0.4, warmup_epochs=2.0,
        )
        for depth, ijb, mfr in ((18, 95.77, 79.13), (50, 97.48, 94.03), (100, 97.82, 96.69), (200, 97.97, 97.70))
    },
}  # fmt: skip

# AdaFace, scripts/run_ir*_ms1mv2.sh and train_val.py: no decay of batch norms, BGR images.
adaface = Config(
    net_mode="ir", net_depth=50, loss_type="adaface", margin=0.4, data_mode="", val_targets=TARGETS, epochs=26,
    batch_size=512, lr=0.1, milestones=(12, 20, 24), weight_decay=5e-4, opt_level="O1", loss_scale="dynamic",
    weights_channel_order="bgr",
)  # fmt: skip
_ADAFACE = {
    f"adaface_{name}_r{depth}": Published(
        replace(adaface, net_depth=depth), "AdaFace, README.md and scripts/run_ir*_ms1mv2.sh (which is for MS1MV2; its "
        "low-resolution, crop and photometric augmentations are not here)", "2 GPUs", 2, SETS[data], "not published",
        accuracy,
    )
    for name, depth, data, accuracy in (
        ("casia", 50, "CASIA", "LFW 99.42 CFP-FP 96.41 CPLFW 89.97 CALFW 93.23 AgeDB 94.38"),
        ("ms1mv2", 50, "MS1MV2", "LFW 99.82 CFP-FP 97.86 AgeDB 97.85, IJB-C 1e-4 96.27"),
        ("ms1mv2", 100, "MS1MV2", "LFW 99.82 CFP-FP 98.49 AgeDB 98.05, IJB-C 1e-4 96.89"),
        ("ms1mv3", 100, "MS1MV3", "LFW 99.78 CFP-FP 98.91 AgeDB 98.17, IJB-C 1e-4 97.09"),
        ("wf4m", 50, "WF4M", "LFW 99.78 CFP-FP 98.97 AgeDB 97.78, IJB-C 1e-4 96.98"),
        ("wf4m", 100, "WF4M", "LFW 99.80 CFP-FP 99.17 AgeDB 97.90, IJB-C 1e-4 97.39"),
        ("wf12m", 100, "WF12M", "LFW 99.82 CFP-FP 99.26 AgeDB 98.00, IJB-C 1e-4 97.66"),
    )
}  # fmt: skip

# PLSC 2.x and arcface_paddle: the rate is per total batch of 512, everything decays.
arcface_paddle = Config(
    net_mode="resnet", net_depth=50, drop_ratio=0.0, loss_type="arcface", margin=0.5, sample_rate=0.1,
    update_rows="all", data_mode="", val_targets=TARGETS, epochs=25, batch_size=128 * 8, lr=0.1 * 1024 / 512,
    milestones=(10, 16, 22), weight_decay=5e-4, decay_norms=True, opt_level="fp16", loss_scale="dynamic",
    init_loss_scaling=27648.0, decr_every_n_nan_or_inf=1,
)  # fmt: skip
_V100 = "8 V100"


def _plsc(accuracy: str, **changes) -> Published:
    source = "PLSC v2.2.0, README.md (dynamic mode, fp16)"
    return Published(replace(arcface_paddle, **changes), source, _V100, 8, SETS["MS1MV3"], "not published", accuracy)


_PLSC = {
    "plsc_ms1mv3_r50": _plsc("AgeDB 98.367 CFP-FP 99.029 LFW 99.850 (the best of all looks at each set)"),
    "plsc_ms1mv3_r50_ratio1": _plsc("AgeDB 98.317 CFP-FP 98.971 LFW 99.850 (as above)", sample_rate=1.0),
    "plsc_ms1mv3_r100": _plsc("AgeDB 98.500 CFP-FP 99.143 LFW 99.867 (as above)", net_depth=100),
    "plsc_ms1mv3_r100_ratio1": _plsc(
        "AgeDB 98.500 CFP-FP 99.214 LFW 99.883 (as above)", net_depth=100, sample_rate=1.0
    ),
    "plsc_ms1mv3_mobileface": Published(
        replace(
            arcface_paddle, net_mode="mobilefacenet", drop_ratio=None, embedding_size=128, opt_level="O0",
            loss_scale="128.0",
        ),
        "PLSC v2.2.0, README.md (fp32)", _V100, 8, SETS["MS1MV3"], "not published",
        "AgeDB 96.200 CFP-FP 96.571 LFW 99.567 (as above)",
    ),
    "plsc_ms1mv2_mobileface": Published(
        replace(
            arcface_paddle, net_mode="mobilefacenet", drop_ratio=None, embedding_size=128, sample_rate=1.0,
            batch_size=512, lr=0.1, opt_level="O0", loss_scale="128.0",
        ),
        "arcface_paddle, configs/ms1mv2_mobileface.py", "1 V100, fp32", 1, SETS["MS1MV2"], "not published",
        "LFW 99.52 CFP-FP 92.80 AgeDB 96.12",
    ),
}  # fmt: skip

PUBLISHED = {**_ARCFACE_TORCH, **_ADAFACE, **_PLSC}
