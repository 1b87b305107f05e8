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
    return Published(replace(arcface_torch, **changes), source, hardware, ranks, SETS.get(data, data), wall, accuracy)


def _filtered(rate: float) -> dict:
    return dict(sample_rate=rate, interclass_filtering_threshold=0.4)


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
    **{
        f"wf12m_pfc{rate:03d}_r100": Published(
            replace(arcface_torch, **_cosface, **_r100, sample_rate=rate / 100),
            "arcface_torch, docs/eval.md (no config file)", GPUS, 8, SETS["WF12M"], "not published",
            f"IJB-C 1e-4 {ijb}, MFR-ALL {mfr}",
        )
        for rate, ijb, mfr in ((30, 97.64, 94.71), (10, 97.56, 94.49), (5, 97.51, 94.05))
    },
    # WebFace12M with wrong labels: the set is the user's to make
    **{
        name: _of(
            name, data, "not published", f"IJB-C 1e-4 {ijb}, MFR-ALL {mfr}", **_cosface, warmup_epochs=2.0, **noise
        )
        for name, data, ijb, mfr, noise in (
            ("wf12m_flip_r50", "WF12M, 40 % of labels flipped", 88.35, 43.87, {}),
            ("wf12m_flip_pfc01_filter04_r50", "WF12M, 40 % of labels flipped", 96.11, 80.20, _filtered(0.1)),
            ("wf12m_conflict_r50", "WF12M as 1,017,970 identities", 95.30, 79.93, {}),
            ("wf12m_conflict_pfc03_filter04_r50", "WF12M as 1,017,970 identities", 97.28, 91.68, _filtered(0.3)),
        )
    },
}  # fmt: skip

# AdaFace, scripts/run_ir*_ms1mv2.sh and train_val.py: no decay of batch norms, BGR images.
adaface = Config(
    net_mode="ir", net_depth=50, loss_type="adaface", margin=0.4, data_mode="", val_targets=TARGETS, epochs=26,
    batch_size=512, lr=0.1, milestones=(12, 20, 24), weight_decay=5e-4, opt_level="O1", loss_scale="dynamic",
    weights_channel_order="bgr", augment=("crop", "low_resolution", "photometric"),
)  # fmt: skip
_ADAFACE = {
    f"adaface_{name}_r{depth}": Published(
        replace(adaface, net_depth=depth), "AdaFace, README.md and scripts/run_ir*_ms1mv2.sh (which is for MS1MV2; it "
        "crops, blurs and colours a fifth of the images each: --augment does so by its own numbers)", "2 GPUs", 2,
        SETS[data], "not published", accuracy,
    )
    for name, depth, data, accuracy in (
        ("casia", 18, "CASIA", "LFW 99.13 CFP-FP 92.59 CPLFW 87.00 CALFW 92.65 AgeDB 92.72"),
        ("wf4m", 18, "WF4M", "LFW 99.53 CFP-FP 97.26 AgeDB 96.47, IJB-C 1e-4 94.99"),
        ("casia", 50, "CASIA", "LFW 99.42 CFP-FP 96.41 CPLFW 89.97 CALFW 93.23 AgeDB 94.38"),
        ("ms1mv2", 50, "MS1MV2", "LFW 99.82 CFP-FP 97.86 AgeDB 97.85, IJB-C 1e-4 96.27"),
        ("ms1mv2", 100, "MS1MV2", "LFW 99.82 CFP-FP 98.49 AgeDB 98.05, IJB-C 1e-4 96.89"),
        ("ms1mv3", 100, "MS1MV3", "LFW 99.78 CFP-FP 98.91 AgeDB 98.17, IJB-C 1e-4 97.09"),
        ("wf4m", 50, "WF4M", "LFW 99.78 CFP-FP 98.97 AgeDB 97.78, IJB-C 1e-4 96.98"),
        ("wf4m", 100, "WF4M", "LFW 99.80 CFP-FP 99.17 AgeDB 97.90, IJB-C 1e-4 97.39"),
        ("wf12m", 100, "WF12M", "LFW 99.82 CFP-FP 99.26 AgeDB 98.00, IJB-C 1e-4 97.66"),
    )
}  # fmt: skip

# CVLface, run_v1/scripts/examples and optims/configs/step_sgd.yaml: a warm-up of an epoch, no decay of biases either,
# fp32 with TF32; augmentations as AdaFace.
cvlface = replace(
    adaface, batch_size=7 * 256, warmup_epochs=1.0, clip_grad_norm=5.0, opt_level="O0", tf32=True,
    weights_channel_order="",
)  # fmt: skip
_CVLFACE = {
    f"cvlface_{name}_{loss}_r{depth}": Published(
        replace(cvlface, net_depth=depth, **changes),
        "CVLface, pretrained_models/README.md and run_v1/scripts/examples", "7 GPUs", 7, SETS[data], "not published",
        accuracy,
    )
    for name, data, loss, depth, changes, accuracy in (
        ("casia", "CASIA", "ada", 50, {}, "LFW 99.37 CFP-FP 97.04 AgeDB 94.40, IJB-C 1e-4 52.97"),
        ("casia", "CASIA", "ada", 18, {}, "LFW 99.22 CFP-FP 94.93 AgeDB 92.68, IJB-C 1e-4 37.10"),
        ("ms1mv2", "MS1MV2", "ada", 50, {}, "LFW 99.85 CFP-FP 98.09 AgeDB 97.85, IJB-C 1e-4 96.20"),
        ("ms1mv2", "MS1MV2", "ada", 100, {}, "LFW 99.80 CFP-FP 98.61 AgeDB 98.05, IJB-C 1e-4 96.81"),
        ("ms1mv3", "MS1MV3", "ada", 100, {}, "LFW 99.83 CFP-FP 99.09 AgeDB 98.18, IJB-C 1e-4 97.05"),
        ("wf4m", "WF4M", "ada", 18, {}, "LFW 99.58 CFP-FP 97.80 AgeDB 96.48, IJB-C 1e-4 94.79"),
        ("wf4m", "WF4M", "ada", 50, {}, "LFW 99.78 CFP-FP 98.99 AgeDB 97.78, IJB-C 1e-4 97.01"),
        ("wf4m", "WF4M", "ada", 100, {}, "LFW 99.83 CFP-FP 99.27 AgeDB 97.90, IJB-C 1e-4 97.46"),
        ("wf4m", "WF4M", "arc", 100, dict(loss_type="arcface", margin=0.5), "LFW 99.78 CFP-FP 99.21 AgeDB 97.95, "
         "IJB-C 1e-4 97.30"),
        ("wf12m", "WF12M", "ada", 100, {}, "LFW 99.82 CFP-FP 99.24 AgeDB 98.00, IJB-C 1e-4 97.72"),
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

_A100 = "8 A100, fp16 O1"
_PLSC_2_4 = {  # the settings of arcface_torch, but for the seed and how the scale grows
    "plsc24_ms1mv3_r50": Published(
        arcface_torch, "PLSC v2.4, task/recognition/face", _A100, 8, SETS["MS1MV3"], "not published",
        "IJB-C 1e-4 96.43, 1e-5 94.43",
    ),
    "plsc24_wf42m_r100": Published(
        replace(arcface_torch, **_WF42M, **_r100), "PLSC v2.4, task/recognition/face", _A100, 8, SETS["WF42M"],
        "not published", "IJB-C 1e-4 97.78, 1e-5 96.46",
    ),
}  # fmt: skip

PUBLISHED = {**_ARCFACE_TORCH, **_ADAFACE, **_CVLFACE, **_PLSC, **_PLSC_2_4}

# Published recipes that this program cannot follow: what it lacks, and what was published.
LACKING = {
    "arcface_torch wf42m_pfc0008_32gpu_r100": "samples smaller than a batch; IJB-C 1e-4 97.51, MFR-ALL 93.08",
    "arcface_torch wf42m_pfc03_40epoch_*_vit_{t,s,b,l}": "ViT backbones and AdamW; IJB-C 1e-4 97.31 97.73 97.90 98.00",
    "CVLface ViT, ViT-KPRPE": "ViT backbones, key points beside the images; WF4M IJB-C 1e-4 97.14, 97.13",
    "PLSC v2.4 FaceViT_tiny, _base, MobileFaceNet_base": "these backbones; WF42M IJB-C 1e-4 97.24, 97.97, 95.22",
    "TransFace, LVFace": "ViT backbones and AdamW; Glint360K IJB-C 1e-4 97.61 (L), 97.70 (B)",
    "TopoFR": "its loss over topology; MS1MV2 IJB-C 1e-4 96.49 (r50) 96.95 (r100)",
    "UniFace": "its unified threshold loss; CASIA r50 LFW 99.56",
    "face.evoLVe": "focal loss; MS1MV2 IR-50 LFW 99.78 CFP-FP 98.14 AgeDB 97.53",
    "GhostFaceNets": "GhostNet backbones; MS1MV3 LFW 99.73 AgeDB 98.00",
}
