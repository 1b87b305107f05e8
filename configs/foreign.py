"""Config files of arcface_torch (`config = edict(); config.lr = 0.1 ...`) as recipes: read as data, never executed."""

from __future__ import annotations

import ast
import operator
from pathlib import Path
from typing import Any

from config import Config, replace
from configs.published import arcface_torch
from runtime.errors import ConfigError
from runtime.files import open_regular

_ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
_ARITHMETIC[ast.FloorDiv] = operator.floordiv
_MOST_BYTES = 1 << 20
_MOST_BRACKETS = 1000  # nested deeply they overflow the parser
NETWORKS = {f"r{depth}": ("iresnet", depth) for depth in (18, 34, 50, 100, 200)}
NETWORKS.update(mbf=("mbf", None), mbf_large=("mbf_large", None))

# Its name -> ours, where the value means the same.
SAME = {
    "embedding_size": "embedding_size",
    "sample_rate": "sample_rate",
    "interclass_filtering_threshold": "interclass_filtering_threshold",
    "momentum": "momentum",
    "weight_decay": "weight_decay",
    "lr": "lr",
    "num_epoch": "epochs",
    "warmup_epoch": "warmup_epochs",
    "num_classes": "num_classes",
    "num_workers": "num_workers",
    "frequent": "log_every",
    "seed": "seed",
    "gradient_acc": "accumulate",
    "output": "work_path",
    "val_targets": "val_targets",
}
# What needs no place here, and why.
NEEDLESS = {
    "num_image": "the images are counted in the data set",
    "resume": "--resume continues a training",
    "verbose": "verification comes after every epoch",
    "save_all_states": "a checkpoint holds all that --resume needs",
    "dali": "the loader of data/ needs no other library",
}


def read_config(path, ranks: int) -> tuple[Config, list[str]]:
    """(the recipe, a line for each key without a place here or with another meaning) of an arcface_torch config file.

    ranks: how many train, for its batch size is a rank's. What the file leaves out is as configs/base.py has it. Raises
    ConfigError, one line, for a file that holds anything but values.
    """
    values = _values(Path(path))
    notes, changes = [], {}
    for key, value in values.items():
        if value is None:
            continue
        elif key in SAME:
            changes[SAME[key]] = tuple(value) if isinstance(value, list) else value
        elif key == "rec":
            if value == "synthetic":
                changes["data_mode"] = "synthetic"
            else:
                changes["data_path"] = value
        elif key == "network":
            if not isinstance(value, str) or value not in NETWORKS:
                raise ConfigError(f"{path}: network {value!r}: choose from {', '.join(NETWORKS)}")
            changes["net_mode"], depth = NETWORKS[value]
            changes.update({} if depth is None else {"net_depth": depth})
        elif key == "margin_list":
            changes.update(_margin(value, path))
        elif key == "fp16":
            changes["opt_level"] = "O1" if value else "O0"
        elif key in ("batch_size", "optimizer"):
            continue
        elif key in NEEDLESS:
            notes.append(f"{key}: not needed, {NEEDLESS[key]}")
        else:
            notes.append(f"{key} = {value!r}: has no place here")
    if values.get("optimizer", "sgd") != "sgd":
        raise ConfigError(f"{path}: optimizer {values['optimizer']!r}: only sgd is here")
    per_rank, accumulate = values.get("batch_size", 128), changes.get("accumulate", 1)
    if not all(isinstance(value, int) and value > 0 for value in (per_rank, accumulate)):
        raise ConfigError(
            f"{path}: batch_size {per_rank!r}, gradient_acc {accumulate!r}: must be whole numbers above 0"
        )
    changes["batch_size"] = per_rank * ranks * accumulate
    notes += [
        f"batch_size: {per_rank} a rank there; here all together, {changes['batch_size']} on {ranks} rank(s)",
        "weight_decay: of everything there, batch norms and centers too: so --decay_norms is on",
    ]
    try:
        return replace(arcface_torch, **changes).check(), notes
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _margin(value: Any, path) -> dict:
    if not isinstance(value, (list, tuple)) or len(value) != 3:
        raise ConfigError(f"{path}: margin_list {value!r}: needs three numbers")
    m1, m2, m3 = value
    if m1 == 1.0 and m3 == 0.0:
        return {"loss_type": "arcface_straight_through", "margin": m2}
    if m1 == 1.0 and m2 == 0.0:
        return {"loss_type": "cosface", "margin": m3}
    return {"loss_type": "combined", "margin": None, "combined_margin": tuple(value)}


def _values(path: Path) -> dict[str, Any]:
    try:
        with open_regular(path) as file:
            text = file.read(_MOST_BYTES + 1).decode("utf-8")
        if len(text) > _MOST_BYTES or sum(map(text.count, "([{")) > _MOST_BRACKETS:
            raise ConfigError(f"{path}: too large for a config file")
        tree = ast.parse(text, str(path))
    except OSError as error:
        raise ConfigError(
            f"--config {path}: cannot be read ({error.strerror}): give a recipe's name or a file"
        ) from None
    except (SyntaxError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: is no config file ({' '.join(str(error).split())[:80]})") from None
    values: dict[str, Any] = {}
    for statement in tree.body:
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue  # a docstring
        if isinstance(statement, ast.ImportFrom) and statement.module == "easydict":
            continue
        target = statement.targets[0] if isinstance(statement, ast.Assign) and len(statement.targets) == 1 else None
        if isinstance(target, ast.Name) and _is_empty_dict(statement.value):
            continue
        if not (isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name)):
            raise _code(path, statement)
        try:
            values[target.attr] = _value(statement.value, values, target.value.id, path)
        except RecursionError:
            raise ConfigError(f"{path} line {statement.lineno}: is nested too deeply for a value") from None
    return values


def _is_empty_dict(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args and not node.keywords


def _value(node: ast.AST, values: dict, name: str, path: Path) -> Any:
    """A literal, arithmetic of numbers, or a key that was set before."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(item, values, name, path) for item in node.elts]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_number(node.operand, values, name, path)
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        left, right = (_number(side, values, name, path) for side in (node.left, node.right))
        try:
            return _ARITHMETIC[type(node.op)](left, right)
        except (ZeroDivisionError, OverflowError):
            pass
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == name:
        if node.attr in values:
            return values[node.attr]
    raise _code(path, node)


def _number(node: ast.AST, values: dict, name: str, path: Path):
    value = _value(node, values, name, path)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _code(path, node)
    return value


def _code(path: Path, node: ast.AST) -> ConfigError:
    return ConfigError(
        f"{path} line {node.lineno}: holds code, and config files are read as values only: "
        "lines such as 'config.lr = 0.1' are taken"
    )
