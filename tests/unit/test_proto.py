"""The generated wire code belongs to the proto file beside it."""

from __future__ import annotations

from pathlib import Path

import grpc_tools
from grpc_tools import protoc

ROOT = Path(__file__).parents[2]
PROTO = "cqil_dist/rpc/v1/generation.proto"


def test_generated_code_is_fresh(tmp_path: Path) -> None:
    """`make proto` writes the same files again."""
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    assert protoc.main(["", f"-I{ROOT / 'protos'}", f"-I{well_known}", *outputs, PROTO]) == 0
    for name in ("generation_pb2.py", "generation_pb2.pyi", "generation_pb2_grpc.py"):
        fresh = (tmp_path / "cqil_dist/rpc/v1" / name).read_text(encoding="utf-8")
        kept = (ROOT / "cqil_dist/rpc/v1" / name).read_text(encoding="utf-8")
        assert fresh == kept, f"{name} is stale: run make proto"
