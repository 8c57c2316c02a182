"""Read OpenAI's checkpoints, which TensorFlow's Saver wrote, without TensorFlow.

Two files hold the checkpoint "model.ckpt" (a third, model.ckpt.meta, has the graph and is not read).
All integers are little-endian.

model.ckpt.data-00000-of-00001: the elements of all tensors, in C order, at the offsets that the index gives.

model.ckpt.index: a LevelDB table (table_format.md in LevelDB's documentation), which maps each name to its place:
    file     data blocks, metaindex block (empty), index block, footer
    footer   48 bytes: handle of the metaindex block, handle of the index block, zeros, the 8 bytes of MAGIC
    handle   varint offset of a block in the file, varint size of its contents
    block    contents, 1 byte compression (0 none, 1 Snappy), uint32 masked CRC-32C of the contents and that byte
    contents records in the order of their keys, n uint32 restart offsets, uint32 n
    record   varint n_shared, varint n_new, varint n_value, then n_new bytes that follow the first n_shared bytes of the
             previous key, then the n_value bytes of the value
    varint   7 bits per byte, the lowest first; the top bit is set in all bytes but the last

The values in the index block are the handles of the data blocks. The values in the data blocks are protocol buffers
(tensorflow/core/protobuf/tensor_bundle.proto), in which a field is a varint 8*number + wire type and then the value.
The key "" has the BundleHeaderProto, every other key is the name of a tensor and has its BundleEntryProto:
    header   1 num_shards, 2 endianness (0 little)
    entry    1 dtype (1 float32), 2 shape {2 dim {1 size}}, 3 shard_id, 4 offset, 5 size in bytes, 6 masked CRC-32C
A masked CRC is the CRC rotated right by 15 bits plus 0xA282EAD8.
"""

import contextlib
import io
import math
import os
import re
from typing import NamedTuple

import numpy as np

from weights.errors import CorruptFile, UserError
from weights.files import map_file, read_text
from weights.names import check_names, check_size, check_tensor, nest, tensor_shapes

INDEX, DATA = ".index", ".data-00000-of-00001"
MAGIC = 0xDB4775248B80FB57.to_bytes(8, "little")
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types
DTYPES = {1: "float32", 2: "float64", 3: "int32", 9: "int64", 14: "bfloat16", 19: "float16"}


class Entry(NamedTuple):
    """Where a tensor lies in the data file: offset and size in bytes, and the masked CRC-32C of these bytes."""

    dtype: str
    shape: tuple
    offset: int
    size: int
    crc32c: int


def checkpoint_prefix(model_dir):
    """Return the path that the file "checkpoint" names, such as models/124M/model.ckpt; None if a file is missing."""
    with contextlib.suppress(OSError, CorruptFile):
        prefix = os.path.join(model_dir, read_prefix(os.path.join(model_dir, "checkpoint")))
        if all(os.path.exists(prefix + end) for end in (INDEX, DATA)):
            return prefix
    return None


def read_prefix(path):
    """Return the name in the file "checkpoint", such as model.ckpt; raise CorruptFile if there is none."""
    named = re.search(r'^model_checkpoint_path: *"(.+)"', read_text(path), re.MULTILINE)
    if not named:
        raise CorruptFile(path, "it names no checkpoint")
    return os.path.basename(named[1])


def load_gpt2_params_from_tf_ckpt(tf_ckpt_path, hparams):
    """Return the nested params of a checkpoint, as read-only views of the memory-mapped data file.

    Verifies the CRC of every tensor. Raises CorruptFile for a damaged file and UserError for a checkpoint that is not
    a GPT-2 of these hparams or that was saved in several files.
    """
    entries = read_index(tf_ckpt_path + INDEX)
    check_size(tf_ckpt_path, hparams, len(entries), sum(entry.size for entry in entries.values()))
    expected = {f"model/{name}": shape for name, shape in tensor_shapes(**hparams).items()}
    check_names(tf_ckpt_path, expected, entries)
    data, tensors = np.frombuffer(map_file(tf_ckpt_path + DATA), np.uint8), {}
    for name, shape in expected.items():
        entry = entries[name]
        found = entry.shape[1:] if name.endswith("/w") else entry.shape  # 1x1 convolutions: [1, n_in, n_out]
        check_tensor(tf_ckpt_path, name, found, entry.dtype, shape, "float32")
        tensor = data[entry.offset : entry.offset + entry.size]
        if tensor.size != 4 * math.prod(shape):
            raise CorruptFile(tf_ckpt_path + DATA, f"{name}: {tensor.size} bytes, {4 * math.prod(shape)} needed")
        if masked_crc32c(tensor) != entry.crc32c:
            raise CorruptFile(tf_ckpt_path + DATA, f"{name}: wrong CRC-32C")
        tensors[name.removeprefix("model/")] = tensor.view("<f4").reshape(shape)
    return nest(tensors, hparams["n_layer"])


def read_index(path):
    """Return the Entry of each tensor, by name; raise CorruptFile for a damaged file, UserError for another kind."""
    table, values = map_file(path), {}
    if table[-8:] != MAGIC:
        raise CorruptFile(path, "not a LevelDB table")
    try:
        footer = io.BytesIO(table[-48:])
        read_block(path, table, footer)  # the metaindex
        for _, handle in read_records(read_block(path, table, footer)):
            values |= read_records(read_block(path, table, io.BytesIO(handle)))
        header = dict(read_fields(values.pop(b"", b"")))
        entries = {name.decode("utf-8"): parse_entry(value) for name, value in values.items()}
    except (EOFError, OverflowError, LookupError, UnicodeDecodeError) as error:
        raise CorruptFile(path, f"malformed: {error}") from None
    if (n_shards := header.get((1, VARINT))) is None:
        raise CorruptFile(path, "no number of data files")
    if n_shards != 1:
        raise UserError(f"{path}: {n_shards} data files; only one is read: save it with tf.train.Saver(sharded=False)")
    if header.get((2, VARINT)):
        raise UserError(f"{path} is big-endian; only little-endian is read: save it again on a little-endian machine")
    return entries


def read_block(path, table, stream):
    """Return the contents of the block whose handle comes next in stream, after verifying its CRC."""
    begin, size = read_varint(stream), read_varint(stream)
    block, crc = table[begin : begin + size + 1], table[begin + size + 1 : begin + size + 5]
    if len(block) != size + 1 or masked_crc32c(block).to_bytes(4, "little") != crc:
        raise CorruptFile(path, f"wrong CRC-32C of the {size} bytes at {begin}")
    if block[-1] != 0:
        raise UserError(f"{path} is compressed; only an uncompressed index is read: save it with tf.train.Saver")
    return block[:-1]


def read_records(contents):
    """Return a list of the (key, value) pairs in a block."""
    n_positions = int.from_bytes(contents[-4:], "little")
    end = len(contents) - 4 * (n_positions + 1)
    stream, key, records = io.BytesIO(contents), b"", []
    while stream.tell() < end:
        n_shared, n_new, n_value = (read_varint(stream) for _ in range(3))
        key = key[:n_shared] + read_bytes(stream, n_new)
        records.append((key, read_bytes(stream, n_value)))
    return records


def parse_entry(message):
    """Return the Entry in a BundleEntryProto; a protocol buffer leaves out fields whose value is 0."""
    fields = dict(read_fields(message))
    dims = [value for key, value in read_fields(fields.get((2, BYTES), b"")) if key == (2, BYTES)]
    return Entry(
        dtype=DTYPES.get(fields.get((1, VARINT)), f"of dtype {fields.get((1, VARINT))}"),
        shape=tuple(dict(read_fields(dim)).get((1, VARINT), 0) for dim in dims),
        offset=fields.get((4, VARINT), 0),
        size=fields.get((5, VARINT), 0),
        crc32c=fields.get((6, FIXED32), 0),
    )


def read_fields(message):
    """Yield ((number, wire type), value) of each field of a protocol buffer, the value as an int or as bytes."""
    stream = io.BytesIO(message)
    while stream.tell() < len(message):
        number, wire_type = divmod(read_varint(stream), 8)
        if wire_type == VARINT:
            value = read_varint(stream)
        elif wire_type == BYTES:
            value = read_bytes(stream, read_varint(stream))
        else:
            value = int.from_bytes(read_bytes(stream, {FIXED64: 8, FIXED32: 4}[wire_type]), "little")
        yield (number, wire_type), value


def read_varint(stream):
    value = 0
    for shift in range(0, 70, 7):
        byte = read_bytes(stream, 1)[0]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value
    raise OverflowError("a varint of more than 10 bytes")


def read_bytes(stream, n):
    found = stream.read(n)
    if len(found) != n:
        raise EOFError(f"{len(found)} bytes where {n} are needed")
    return found


def masked_crc32c(data):
    try:
        import google_crc32c
    except ImportError as error:
        remedy = "pip install -r requirements.txt"
        raise UserError(f"importing a checkpoint needs google-crc32c ({error}); {remedy}") from None
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
