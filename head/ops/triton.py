from head.ops import HeadOp
from head.ops.chunked import Chunked

_t = Chunked()
OP = HeadOp("triton", _t.first, _t.second, lambda device: "not yet")
