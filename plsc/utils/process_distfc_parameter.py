"""Cuts the class centers of a sharded checkpoint anew, for another number of ranks:

    python -m plsc.utils.process_distfc_parameter --pretrained_model_dir=DIR --output_dir=DIR --nranks=8

The options are PLSC's. The checkpoint's own index says what PLSC asked for or kept in meta.json, so --pretrain_nranks,
--num_classes and --emb_dim are only compared with it. It streams: a table of any size passes 32 MiB at a time.
"""

from __future__ import annotations

import argparse
import logging

from checkpoint import layout, reshard
from runtime.errors import CheckpointError
from runtime.log import Parser, run_command, setup_logging

log = logging.getLogger(__name__)

ANY = "@rank@"  # PLSC's mark of distributed parameters; here every row table is one


def main(arguments=None) -> None:
    options = _parser().parse_args(arguments)
    source = reshard.find(options.pretrained_model_dir)
    index = layout.read_index(source)
    _compare(source, index, options)
    if index.world_size == options.nranks:
        log.info("%s is of %d ranks already: nothing to do", source, options.nranks)
        return
    feature = "" if options.name_feature == ANY else options.name_feature
    path = reshard.convert(source, options.output_dir, options.nranks, feature)
    log.info("%s, %d ranks -> %s, %d ranks", source, index.world_size, path, options.nranks)


def _compare(source, index, options) -> None:
    shapes = [stored.shape for name, stored in index.tensors.items() if name.startswith(reshard.ROWS)]
    classes, width = next((shape for shape in shapes if len(shape) == 2), (None, None))
    for option, given, held in [
        ("pretrain_nranks", options.pretrain_nranks, index.world_size),
        ("num_classes", options.num_classes, classes),
        ("emb_dim", options.emb_dim, width),
    ]:
        if given not in (-1, held):
            raise CheckpointError(f"{source}: --{option}={given}, but the checkpoint has {held}: leave the option out")


def _parser() -> Parser:
    parser = Parser(
        prog="python -m plsc.utils.process_distfc_parameter",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--name_feature", default=ANY, help="cut only tables with this in their names (default: all)")
    parser.add_argument("--pretrain_nranks", type=int, default=-1, help="ranks that saved it (default: as it says)")
    parser.add_argument("--nranks", type=int, required=True, help="ranks to write it for")
    parser.add_argument("--num_classes", type=int, default=-1, help="classes (default: as it says)")
    parser.add_argument("--emb_dim", type=int, default=-1, help="embedding size (default: as it says)")
    parser.add_argument("--pretrained_model_dir", required=True, help="a sharded checkpoint, or the folder of them")
    parser.add_argument("--output_dir", required=True, help="folder for the new checkpoint")
    return parser


if __name__ == "__main__":
    setup_logging()
    run_command(main)
