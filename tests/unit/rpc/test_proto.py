"""The generated code in cqil_dist/rpc/v1 belongs to the proto file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc_tools
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet
from grpc_tools import protoc

ROOT = Path(__file__).parents[3]
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


def test_everything_in_it_is_documented(tmp_path: Path) -> None:
    """Every service, method, message, field and value has a comment of its own before it."""
    file = tmp_path / "descriptors"
    asked = [f"-I{ROOT / 'protos'}", "--include_source_info", f"--descriptor_set_out={file}", PROTO]
    assert protoc.main(["", *asked]) == 0
    (proto,) = FileDescriptorSet.FromString(file.read_bytes()).file
    documented = {
        tuple(place.path) for place in proto.source_code_info.location if place.leading_comments
    }
    assert not [name for path, name in _everything(proto) if path not in documented]


def _everything(proto: FileDescriptorProto) -> Iterator[tuple[tuple[int, ...], str]]:
    """The paths, as in SourceCodeInfo.Location, and the names of all that is defined."""
    for i, message in enumerate(proto.message_type):
        yield (4, i), message.name
        for j, field in enumerate(message.field):
            yield (4, i, 2, j), f"{message.name}.{field.name}"
    for i, enum in enumerate(proto.enum_type):
        yield (5, i), enum.name
        for j, value in enumerate(enum.value):
            yield (5, i, 2, j), value.name
    for i, service in enumerate(proto.service):
        yield (6, i), service.name
        for j, method in enumerate(service.method):
            yield (6, i, 2, j), method.name
