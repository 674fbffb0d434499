"""The bundle: the one form in which a model lies on disk, written atomically and read strictly.

    model.safetensors            or model-0000i-of-0000n.safetensors with model.safetensors.index.json above the shard size
    params.json                  Meta's keys, plus ffn_hidden_dim and max_seq_len
    tokenizer.model              SentencePiece
    meta_adapter.yaml            intermediate_size, rope_theta, dtype, n_future_tokens; must agree with params.json
    metadata.json                format version, source, dtype, SHA256 of every other file, what was dropped, extra facts

Equal inputs give equal bytes: no date and no path of the machine is written unless the caller puts it into `extra`.
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from safetensors import SafetensorError, safe_open

from wmtp.atomic import atomic_directory, one_line, require_space

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION = 1
DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
HEADER_BYTES = 256  # a tensor's entry in a safetensors header is shorter than this
INDEX = "model.safetensors.index.json"
FLOATS = ("ffn_dim_multiplier", "norm_eps", "rope_theta")
OPTIONAL = ("ffn_dim_multiplier", "ffn_hidden_dim")
REQUIRED = ("params.json", "tokenizer.model", "meta_adapter.yaml")
METADATA_KEYS = {"format_version": int, "source": str, "dtype": str, "sha256": dict, "dropped": list, "extra": dict}
KINDS = {int: "number", str: "text", dict: "mapping", list: "list"}


class NotFinite(ArithmeticError):
    """A loss, a gradient, a logit or a weight of a model that is infinite or not a number."""


class BundleError(ValueError):
    """A bundle that is not what its manifest says; one line: file or tensor, expected, found, how to mend."""


@dataclass(frozen=True)
class ModelArgs:
    """Meta's params.json and two keys of ours. Meta counts the extra heads as layers."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    multiple_of: int
    ffn_dim_multiplier: float | None
    norm_eps: float
    rope_theta: float
    n_future_tokens: int
    ffn_hidden_dim: int | None = None  # replaces Llama's rule, for models whose width does not follow it
    max_seq_len: int = 2048  # tokens

    def __post_init__(self):
        for name, value in asdict(self).items():
            if value is None and name in OPTIONAL:
                continue
            if type(value) not in ((int, float) if name in FLOATS else (int,)) or not 0 < value < math.inf:
                raise BundleError(f"params: {name}: expected a positive {'number' if name in FLOATS else 'integer'}, found {value!r}")
            if name in FLOATS:
                object.__setattr__(self, name, float(value))  # JSON may say 10000 for 10000.0; equal settings give equal bytes
        if self.dim % self.n_heads or self.head_dim % 2:
            raise BundleError(f"params: dim {self.dim}: expected n_heads {self.n_heads} times an even head width (rotary pairs)")
        if self.n_heads % self.n_kv_heads:
            raise BundleError(f"params: n_heads {self.n_heads}: expected a multiple of n_kv_heads {self.n_kv_heads}")
        if self.n_layers < self.n_future_tokens:
            raise BundleError(
                f"params: n_layers {self.n_layers}: expected n_future_tokens {self.n_future_tokens} or more: heads are layers"
            )

    @property
    def hidden_dim(self) -> int:
        """Feed-forward width: `ffn_hidden_dim`, else Llama's rule (2/3 of 4 dim, times the multiplier, rounded up)."""
        if self.ffn_hidden_dim is not None:
            return self.ffn_hidden_dim
        width = 2 * 4 * self.dim // 3
        if self.ffn_dim_multiplier is not None:
            width = int(self.ffn_dim_multiplier * width)
        return self.multiple_of * -(-width // self.multiple_of)

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def n_trunk(self) -> int:
        """Blocks on the next-token path; the last of them is head 0."""
        return self.n_layers - self.n_future_tokens + 1

    def with_heads(self, n_future: int) -> "ModelArgs":
        """The same trunk with `n_future` heads in all (1: no extra head)."""
        if n_future < 1:
            raise BundleError(f"n_future: expected at least 1, found {n_future}")
        return replace(self, n_layers=self.n_trunk + n_future - 1, n_future_tokens=n_future)

    @classmethod
    def from_json(cls, path: str | Path) -> "ModelArgs":
        """Reads a bundle's params.json: every key present, no other key; BundleError names the file and the key."""
        raw = read_json(Path(path))
        check_keys(Path(path), raw, [field.name for field in fields(cls)])
        try:
            return cls(**raw)
        except BundleError as error:
            raise BundleError(f"{path}: {error}") from None

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


def tensor_shapes(args: ModelArgs) -> dict[str, tuple[int, ...]]:
    """Every tensor of a model by Meta's name, in the order in which bundles hold them."""
    width, hidden = args.dim, args.hidden_dim
    queries, keys = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    block = {
        "attention.wq.weight": (queries, width),
        "attention.wk.weight": (keys, width),
        "attention.wv.weight": (keys, width),
        "attention.wo.weight": (width, queries),
        "feed_forward.w1.weight": (hidden, width),
        "feed_forward.w2.weight": (width, hidden),
        "feed_forward.w3.weight": (hidden, width),
        "attention_norm.weight": (width,),
        "ffn_norm.weight": (width,),
    }
    places = [f"layers.{i}" for i in range(args.n_trunk)] + [f"extra_heads.{i}" for i in range(args.n_future_tokens - 1)]
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (args.vocab_size, width)}
    shapes |= {f"{place}.{name}": shape for place in places for name, shape in block.items()}
    return shapes | {"norm.weight": (width,), "output.weight": (args.vocab_size, width)}


def plan_shards(shapes: Mapping[str, tuple[int, ...]], dtype: str, limit: int) -> dict[str, list[str]]:
    """File name to tensor names, in order; no file exceeds `limit` bytes unless a single tensor does."""
    groups: list[list[str]] = []
    room = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * ITEM_BYTES[dtype] + HEADER_BYTES
        if not groups or size > room:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, 1)}


def write_bundle(
    out: str | Path,
    args: ModelArgs,
    tensors: "Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]",
    tokenizer: bytes,
    *,
    source: str,
    dropped: list[str],
    extra: dict,
    shard_bytes: int = 1 << 30,
    beside: Callable[[Path], dict] | None = None,
) -> None:
    """Writes a whole bundle or nothing; an `out` that holds a bundle is replaced.

    `beside` may put a folder of its own next to the files; what it returns is added to `extra`.

    `tensors` has exactly the names and shapes of tensor_shapes(args) and one dtype. An iterable comes in that order, so that one
    shard is held at a time; a mapping may have any. One writer per `out`.
    """
    shapes = tensor_shapes(args)
    if isinstance(tensors, Mapping):
        check_names("the given tensors", set(tensors), set(shapes))
        stream = ((name, tensors[name]) for name in shapes)
    else:
        stream = iter(tensors)
    first = next(stream, None)
    if first is None:
        raise BundleError(f"{out}: expected {len(shapes)} tensors, found none")
    dtype = dtype_name(*first)
    plan = plan_shards(shapes, dtype, shard_bytes)
    total = sum(math.prod(shape) for shape in shapes.values()) * ITEM_BYTES[dtype]
    with atomic_directory(out, marker="metadata.json") as folder:
        require_space(folder, total + HEADER_BYTES * len(shapes) + len(tokenizer) + (1 << 16))
        write_shards(folder, plan, shapes, dtype, chain([first], stream))
        (folder / "params.json").write_text(args.to_json())
        (folder / "tokenizer.model").write_bytes(tokenizer)
        (folder / "meta_adapter.yaml").write_text(yaml.safe_dump(adapter(args, dtype), sort_keys=False))
        if len(plan) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": {name: file for file, names in plan.items() for name in names}}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        metadata = {
            "format_version": FORMAT_VERSION,
            "source": source,
            "dtype": dtype,
            "sha256": hash_files(folder, sorted(file.name for file in folder.iterdir())),
        }
        metadata |= {"dropped": dropped, "extra": extra | (beside(folder) if beside else {})}
        (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def write_shards(folder: Path, plan: dict[str, list[str]], shapes: Mapping, dtype: str, stream: Iterator) -> None:
    for file, names in plan.items():
        shard: dict[str, Tensor] = {}
        for expected in names:
            name, tensor = next(stream, ("the end", None))
            if name != expected:
                raise BundleError(f"tensors out of order, missing or unknown: expected {expected}, found {name}")
            if tuple(tensor.shape) != shapes[name] or dtype_name(name, tensor) != dtype:
                found = f"{dtype_name(name, tensor)} {tuple(tensor.shape)}"
                raise BundleError(f"{name}: expected {dtype} {shapes[name]}, found {found}")
            shard[name] = tensor.detach().contiguous()
        save_tensors(shard, folder / file)
    if (more := next(stream, None)) is not None:
        raise BundleError(f"{more[0]}: unknown or repeated tensor after the last expected one; params: more layers than n_layers?")


def save_tensors(tensors: "dict[str, Tensor]", file: Path, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file that its group and others may read; tied tensors get bytes of their own, in place, as the format asks."""
    from safetensors.torch import save_file

    _untie(tensors)
    save_file(tensors, file, metadata)
    file.chmod(0o644)  # safetensors writes for its owner alone


def _untie(tensors: "dict[str, Tensor]") -> None:
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.data_ptr() in seen:
            tensors[name] = tensor.clone()
        seen.add(tensor.data_ptr())


def dtype_name(name: str, tensor: "Tensor") -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in ITEM_BYTES:
        raise BundleError(f"{name}: dtype: expected one of {', '.join(ITEM_BYTES)}, found {dtype}")
    return dtype


def adapter(args: ModelArgs, dtype: str) -> dict:
    return {
        "intermediate_size": args.hidden_dim,
        "rope_theta": args.rope_theta,
        "dtype": dtype,
        "n_future_tokens": args.n_future_tokens,
    }


def read_args(path: str | Path) -> ModelArgs:
    return ModelArgs.from_json(Path(path) / "params.json")


def read_metadata(path: str | Path) -> dict:
    """metadata.json, its keys checked: format_version, source, dtype, sha256 (file name to hex), dropped, extra."""
    if not Path(path).is_dir():
        raise BundleError(f"{path}: no such folder, expected a bundle; correct the path, or run the stage that makes it (dvc repro)")
    file = Path(path) / "metadata.json"
    metadata = read_json(file)
    check_keys(file, metadata, METADATA_KEYS)
    for key, kind in METADATA_KEYS.items():
        if type(metadata[key]) is not kind:
            raise BundleError(f"{file}: {key}: expected a {KINDS[kind]}, found {metadata[key]!r}; make the bundle again")
    if not set(REQUIRED) <= set(metadata["sha256"]):
        raise BundleError(f"{file}: sha256: expected hashes of {', '.join(REQUIRED)} and the weights, found {metadata['sha256']!r}")
    if metadata["format_version"] != FORMAT_VERSION:
        raise BundleError(f"{file}: format_version: expected {FORMAT_VERSION}, found {metadata['format_version']}; convert again")
    return metadata


def bundle_sha256(path: str | Path) -> str:
    """Identity of the model: SHA256 over the names and hashes of its files; `source` and `extra` do not enter."""
    return hashlib.sha256(json.dumps(read_metadata(path)["sha256"], sort_keys=True).encode()).hexdigest()


def verify(path: str | Path, hashes: bool = True) -> None:
    """Checks a bundle against its own manifest: files, meta_adapter.yaml, names, shapes, dtype and, unless told otherwise, every SHA256.

    A folder that was put beside the files (write_bundle's `beside`) is not looked at: who reads it checks it (lora.load_adapted).
    """
    folder = Path(path)
    metadata = read_metadata(folder)
    missing = [name for name in metadata["sha256"] if not (folder / name).is_file()]
    if missing:
        raise BundleError(f"{folder / missing[0]}: missing; run the stage that made the bundle again")
    stray = sorted(file.name for file in folder.glob("*.safetensors*") if file.name not in metadata["sha256"])
    if stray:
        raise BundleError(f"{folder / stray[0]}: not in metadata.json; weights of another model? remove it")
    if hashes:
        for name, found in hash_files(folder, list(metadata["sha256"])).items():
            if found != metadata["sha256"][name]:
                raise BundleError(f"{folder / name}: SHA256: expected {metadata['sha256'][name]}, found {found}; make the bundle again")
    args = read_args(folder)
    check_adapter(folder / "meta_adapter.yaml", adapter(args, metadata["dtype"]))
    locate_tensors(folder, metadata, args)


def check_adapter(file: Path, expected: dict) -> None:
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BundleError(f"{file}: not readable: {one_line(error)}") from None
    check_keys(file, found, list(expected))
    for key, value in expected.items():
        if found[key] != value:
            raise BundleError(f"{file}: {key}: expected {value} as in params.json and metadata.json, found {found[key]}")


def locate_tensors(folder: Path, metadata: dict, args: ModelArgs) -> dict[str, Path]:
    """Tensor name to the file that holds it; names, shapes, dtype and index checked, no tensor data read."""
    shapes, places = tensor_shapes(args), {}
    for file in (folder / name for name in metadata["sha256"] if name.endswith(".safetensors")):
        with open_shard(file, "numpy") as shard:
            for name in shard.keys():  # noqa: SIM118  (a handle, not a mapping)
                view = shard.get_slice(name)
                shape, dtype = tuple(view.get_shape()), DTYPES.get(view.get_dtype(), view.get_dtype())
                if name in places:
                    raise BundleError(f"{file}: {name}: is in {places[name].name} too; make the bundle again")
                if name in shapes and (shape, dtype) != (shapes[name], metadata["dtype"]):
                    raise BundleError(f"{file}: {name}: expected {metadata['dtype']} {shapes[name]}, found {dtype} {shape}")
                places[name] = file
    check_names(str(folder), set(places), set(shapes))
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        if not isinstance(index, dict) or index.get("weight_map") != {name: places[name].name for name in shapes}:
            raise BundleError(f"{folder / INDEX}: weight_map disagrees with the shards; make the bundle again")
    elif len(set(places.values())) > 1:
        raise BundleError(f"{folder / INDEX}: missing beside several shards; make the bundle again")
    return places


def read_tensors(path: str | Path, n_future: int | None = None) -> "Iterator[tuple[str, Tensor]]":
    """(name, tensor) in tensor_shapes order, memory-mapped copy-on-write: no memory until used, the file never changes.

    `n_future` names what is left out on purpose: heads from `n_future` on (1: all extra heads); without it everything is read.
    Names, shapes and dtypes are checked before the first tensor; content is checked by `verify`, once per machine, before.
    """
    folder, args = Path(path), read_args(path)
    if n_future is not None and n_future > args.n_future_tokens:
        raise BundleError(f"{folder}: n_future_tokens: expected at least {n_future}, found {args.n_future_tokens}; grow the heads first")
    places = locate_tensors(folder, read_metadata(folder), args)
    wanted = tensor_shapes(args if n_future is None else args.with_heads(n_future))

    def stream() -> "Iterator[tuple[str, Tensor]]":
        with contextlib.ExitStack() as stack:
            shards = {file: stack.enter_context(open_shard(file, "pt")) for file in sorted({places[name] for name in wanted})}
            for name in wanted:
                yield name, shards[places[name]].get_tensor(name)

    return stream()


def open_shard(file: Path, framework: str, mend: str = "make the bundle again"):
    try:
        return safe_open(file, framework=framework)
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{file}: not a whole safetensors file: {one_line(error)}; {mend}") from None


def check_names(where: str, found: set[str], expected: set[str]) -> None:
    for kind, names in (("missing", expected - found), ("unknown", found - expected)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise BundleError(f"{where}: {kind} tensor {min(names)}{more}; expected {len(expected)} tensors, found {len(found)}")


def check_keys(file: Path, found: object, expected: Iterable[str]) -> None:
    if not isinstance(found, dict):
        raise BundleError(f"{file}: expected a mapping, found {type(found).__name__}")
    for kind, keys in (("missing", set(expected) - set(found)), ("unknown", set(found) - set(expected))):
        if keys:
            raise BundleError(f"{file}: {kind} key {min(keys)}; expected exactly {', '.join(expected)}")


def read_json(file: Path, mend: str = "correct the path, or run the stage that makes it (dvc repro)") -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BundleError(f"{file}: no such file; {mend}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{file}: not readable JSON: {one_line(error)}") from None


def hash_files(folder: Path, names: list[str]) -> dict[str, str]:
    """SHA256 by file name; several files at a time, since hashing is the slower half of writing."""

    def digest(name: str) -> str:
        with open(folder / name, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(max_workers=4) as pool:
        return dict(zip(names, pool.map(digest, names)))
