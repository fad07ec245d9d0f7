#!/usr/bin/env python3
"""Reads a factored checkpoint with NumPy alone; docs/format.md describes the format.

    python3 load_factored.py FOLDER                  # what is in it
    python3 load_factored.py FOLDER --out dense.npz  # every tensor, compressed weights rebuilt, halves as float32

    import load_factored
    weights = load_factored.load("FOLDER")                      # name -> array
    linear = load_factored.Checkpoint("FOLDER").operator("some.weight")
    y = linear.forward(x)                                       # x @ W.T from the factors; W is never rebuilt
"""
import argparse, itertools, json, os

import numpy as np

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "U32": "<u4",
          "I32": "<i4", "U64": "<u8", "I64": "<i8", "BOOL": "?"}


class Operator:
    """A matrix that may be held as factors: `shape`, `apply(x)` = W @ x, `dense()`."""

    def __init__(self, shape, apply, text):
        self.shape, self.apply, self.text = tuple(shape), apply, text

    def forward(self, x):
        return self.apply(x.T).T

    def dense(self):
        return self.apply(np.eye(self.shape[1]))


def rows_of(kind, n):
    """The orthogonal n x n matrix of a `basis` node."""
    if kind == "identity":
        return np.eye(n)
    if kind == "hadamard":
        h = np.ones((1, 1))
        while len(h) < n:
            h = np.block([[h, h], [h, -h]])
        return h / np.sqrt(n)
    k, j = np.arange(n)[:, None], np.arange(n)[None, :]
    q = np.cos(np.pi * k * (2 * j + 1) / (2 * n)) * np.sqrt(2 / n)
    q[0] /= np.sqrt(2)
    return {"dct2": q, "dct3": q.T}[kind]


def unpack(packed, count, bits):
    """`count` codes of each row of packed bytes, lowest bit first."""
    stream = np.unpackbits(packed, axis=1, bitorder="little")[:, :count * bits]
    return stream.reshape(-1, count, bits) @ (1 << np.arange(bits))


class Checkpoint:
    """The tensors of a folder or file, mapped, and the operators of its compressed weights."""

    def __init__(self, path):
        self.tensors, self.weights, self.shared = {}, {}, {}
        for file in weight_files(path):
            with open(file, "rb") as f:
                length = int.from_bytes(f.read(8), "little")
                header = json.loads(f.read(length))
            metadata = header.pop("__metadata__", {})
            if "weightpress" in metadata:
                description = json.loads(metadata["weightpress"])
                if description["format"] != 1:
                    raise ValueError(f"{file}: factored format {description['format']}, this program reads 1")
                self.weights.update(description["weights"])
            data = np.memmap(file, np.uint8, "r")
            for name, t in header.items():
                first, end = (8 + length + offset for offset in t["data_offsets"])
                self.tensors[name] = (t["dtype"], t["shape"], data[first:end])

    def tensor(self, name):
        """A stored tensor; BF16 is widened, dtypes that NumPy lacks stay bytes."""
        dtype, shape, data = self.tensors[name]
        if dtype == "BF16":
            return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4").reshape(shape)
        return np.frombuffer(data, DTYPES[dtype]).reshape(shape) if dtype in DTYPES else np.array(data)

    def indices(self, name, length):
        """A set of indices below `length`: a list, or a bit mask, lowest bit first."""
        found = self.tensor(name)
        return np.flatnonzero(np.unpackbits(found, bitorder="little")[:length]) if found.dtype == np.uint8 else found

    def build(self, node):
        op = node["op"]
        if op == "dense":
            matrix = self.tensor(node["tensor"]).astype("f8")
            return Operator(matrix.shape, lambda x: matrix @ x, "dense %dx%d" % matrix.shape)
        if op == "quantized":
            return self.quantized(node)
        if op in ("product", "sum"):
            parts = [self.build(part) for part in node["factors" if op == "product" else "terms"]]
            if op == "sum":
                return Operator(parts[0].shape, lambda x: sum(p.apply(x) for p in parts), " + ".join(p.text for p in parts))

            def product(x):
                for part in reversed(parts):
                    x = part.apply(x)
                return x
            return Operator((parts[0].shape[0], parts[-1].shape[1]), product, " . ".join(p.text for p in parts))
        if op == "stacked":
            parts = [self.build(part) for part in node["parts"]]
            heights = [part.shape[0] for part in parts]
            bits = max(len(parts) - 1, 1).bit_length()
            places = unpack(self.tensor(node["places"])[None], sum(heights), bits)[0]

            def stack(x):  # row i is the next row of part places[i]
                y = np.empty((len(places), x.shape[1]))
                for at, part in enumerate(parts):
                    y[places == at] = part.apply(x)
                return y
            return Operator((len(places), parts[0].shape[1]), stack, "rows of " + " and ".join(p.text for p in parts))
        if op == "mixture":
            atoms, c = [self.build(part) for part in node["atoms"]], self.tensor(node["coefficients"]).astype("f8")[0]
            text = "mixture %dx%d of %d" % (*atoms[0].shape, len(atoms))
            return Operator(atoms[0].shape, lambda x: sum(c * a.apply(x) for c, a in zip(c, atoms)), text)
        if op == "shared":
            if node["id"] not in self.shared:
                self.shared[node["id"]] = self.build(node["node"])
            inner = self.shared[node["id"]]
            return Operator(inner.shape, inner.apply, "shared " + inner.text)
        if op == "block-diagonal":
            return self.block_diagonal(node["tensor"], node.get("extents"))
        if op in ("permutation", "grid"):
            shape, sources = self.permutation(node)

            def pick(x):  # y[i] = x[sources[i]], 0 from the end of x on
                return np.vstack([x, np.zeros_like(x[:1])])[np.minimum(sources, shape[1])]
            return Operator(shape, pick, "permutation %dx%d" % shape)
        if op in ("nm-sparse", "bitmask"):
            return self.sparse(node)
        length, left = node["len"], node["side"] == "left"
        chosen = self.indices(node["pivots" if op == "interpolative" else "indices"], length)
        shape = (length, len(chosen)) if left else (len(chosen), length)
        text = "%s %dx%d" % (op, *shape)
        if op == "basis":  # chosen rows of an orthogonal matrix; a fast transform would do as well
            atoms = rows_of(node["kind"], length)[chosen]
            return Operator(shape, lambda x: (atoms.T if left else atoms) @ x, text)
        if op != "interpolative":
            raise ValueError(f"unknown operator {op!r}")
        t, rest = node["coefficients"], np.setdiff1d(np.arange(length), chosen)
        t = self.build({"op": "dense", "tensor": t} if isinstance(t, str) else t)

        def interpolate(x):
            if not left:  # identity columns at the pivots, t in the others
                return x[chosen] + t.apply(x[rest])
            y = np.empty((length, x.shape[1]))  # identity rows at the pivots, t in the others
            y[chosen], y[rest] = x, t.apply(x)
            return y
        return Operator(shape, interpolate, text)

    def quantized(self, node):
        """scale * (code - zero point) + offset, all of a group of columns; codes are a stream of bits in each row."""
        bits, group, columns = node["bits"], node["group"], node["columns"]

        scales, zeros, offsets = (np.repeat(a, group, axis=1)[:, :columns] for a in self.grid(node))
        matrix = scales * (unpack(self.tensor(node["codes"]), columns, bits) - zeros) + offsets
        return Operator(matrix.shape, lambda x: matrix @ x, "%d-bit %dx%d" % (bits, *matrix.shape))

    def grid(self, node):
        """Scales, zero points and offsets, rows x groups: of the latter two at most one is stored."""
        scales = self.tensor(node["scales"]).astype("f8")
        middle, none = np.full(scales.shape, 1 << node["bits"] - 1), np.zeros(scales.shape)
        zeros = self.tensor(node["zeros"]) if "zeros" in node else none
        if zeros.dtype == np.uint8:
            return scales, unpack(zeros, scales.shape[1], node["bits"]), none
        return scales, middle, zeros.astype("f8")

    def values(self, node, columns):
        """Stored values, those of one row after those of another; `columns` lists the columns of each row's."""
        if isinstance(node, str):
            return self.tensor(node).astype("f8").reshape(-1)
        (scales, zeros, offsets), packed, bits = self.grid(node), self.tensor(node["codes"]), node["bits"]
        rows, at = [], 0
        for i, own in enumerate(columns):
            end = at + (len(own) * bits + 7) // 8
            g = np.asarray(own, int) // node["group"]
            codes = unpack(packed[None, at:end], len(own), bits)[0]
            rows.append(scales[i, g] * (codes - zeros[i, g]) + offsets[i, g])
            at = end
        return np.concatenate(rows)

    def sparse(self, node):
        """Marks from packed positions or a bit mask; the stored values fill them row by row."""
        columns = node["columns"]
        if node["op"] == "bitmask":
            marks = np.unpackbits(self.tensor(node["mask"]), axis=1, bitorder="little")[:, :columns].astype(bool)
        else:
            n, m, packed = node["n"], node["m"], self.tensor(node["positions"])
            choices = np.array([[i in c for i in range(m)] for c in itertools.combinations(range(m), n)])
            digits = max(d for d in range(9) if len(choices) ** d <= 256)
            bits = (len(choices) - 1).bit_length()
            if bits * digits > 8:  # digits in base C(m, n), as many to a byte as fit
                ranks = packed[:, :, None] // len(choices) ** np.arange(digits) % len(choices)
            else:
                ranks = np.unpackbits(packed, axis=1, bitorder="little")
                ranks = ranks[:, :columns // m * bits].reshape(len(packed), -1, bits) @ (1 << np.arange(bits))
            ranks = ranks.reshape(len(packed), -1)[:, :columns // m]
            marks = np.ones((len(packed), columns), bool)  # what is left of a row is stored whole
            marks[:, :columns // m * m] = choices[ranks].reshape(len(packed), -1)
        matrix = np.zeros(marks.shape)
        matrix[marks] = self.values(node["values"], [np.flatnonzero(row) for row in marks])
        return Operator(matrix.shape, lambda x: matrix @ x, "%s %dx%d" % (node["op"], *matrix.shape))

    def block_diagonal(self, values, extents):
        if extents is None:
            extents = [self.tensor(values).shape[1:]] * len(self.tensor(values))
        elif isinstance(extents, list):
            extents = [extents[1:]] * extents[0]
        else:
            extents = self.tensor(extents)
        ends = np.cumsum([[rows, columns, rows * columns] for rows, columns in extents], axis=0, dtype=int)
        flat = self.values(values, [np.arange(columns) for rows, columns in extents for _ in range(rows)])
        blocks = [flat[end - rows * columns:end].reshape(rows, columns) for (rows, columns), end in zip(extents, ends[:, 2])]

        def apply(x):
            return np.concatenate([b @ part for b, part in zip(blocks, np.split(x, ends[:-1, 1]))])
        shape = (int(ends[-1, 0]), int(ends[-1, 1]))
        return Operator(shape, apply, "block-diagonal %dx%d (%d blocks)" % (*shape, len(blocks)))

    def permutation(self, node):
        """Shape, and the column of the 1 of each row; the number of columns where there is none."""
        if node["op"] == "permutation":
            sources = self.tensor(node["list"]).astype(int)
            return (len(sources), node["columns"]), sources
        cells, run = node["rows"] * node["columns"], node["run"]
        runs = self.tensor(run).reshape(-1).astype(int) if isinstance(run, str) else np.full(cells, run)
        starts = np.cumsum(runs) - runs
        order = np.arange(cells).reshape(node["rows"], node["columns"]).T.reshape(-1)
        sources = np.concatenate([np.arange(starts[cell], starts[cell] + runs[cell]) for cell in order])
        return tuple(node["shape"]), sources[:node["shape"][0]]

    def operator(self, name):
        """A weight by its original name, from its factors if it was compressed."""
        return self.build(self.weights[name]["operator"] if name in self.weights else {"op": "dense", "tensor": name})

    def names(self):
        """Original names: compressed weights, and the tensors that are no parts of one."""
        def leaves(node):
            inner = node.values() if isinstance(node, dict) else node if isinstance(node, list) else []
            return {node} if isinstance(node, str) else set().union(*map(leaves, inner))
        parts = leaves([tree["operator"] for tree in self.weights.values()])
        return sorted(set(self.weights) | set(self.tensors) - parts)


def weight_files(path):
    """The files of a checkpoint: a lone one, those of the index, `model.safetensors`, or all there are."""
    if path.endswith(".safetensors"):
        return [path]
    index = path if path.endswith(".json") else os.path.join(path, "model.safetensors.index.json")
    if os.path.exists(index):
        with open(index, "rb") as f:
            files = set(json.load(f)["weight_map"].values())
        return [os.path.join(os.path.dirname(index), file) for file in sorted(files)]
    found = sorted(file for file in os.listdir(path) if file.endswith(".safetensors"))
    return [os.path.join(path, file) for file in (["model.safetensors"] if "model.safetensors" in found else found)]


def load(path):
    """All tensors of a checkpoint by their original names, compressed weights rebuilt."""
    checkpoint = Checkpoint(path)
    wide = {name: "f8" if tree["dtype"] == "F64" else "f4" for name, tree in checkpoint.weights.items()}
    rebuilt = {name: checkpoint.operator(name).dense().astype(dtype) for name, dtype in wide.items()}
    return {name: rebuilt[name] if name in rebuilt else checkpoint.tensor(name) for name in checkpoint.names()}


def main():
    parser = argparse.ArgumentParser(description="Reads a factored checkpoint.")
    parser.add_argument("path", help="a folder, an index or a .safetensors file")
    parser.add_argument("--out", help="write the dense tensors to this .npz file")
    arguments = parser.parse_args()
    if arguments.out:
        np.savez(arguments.out, **load(arguments.path))
        return
    checkpoint = Checkpoint(arguments.path)
    for name in checkpoint.names():
        if name in checkpoint.weights:
            tree = checkpoint.weights[name]
            print(name, tree["dtype"], tree["shape"], checkpoint.operator(name).text)
        else:
            print(name, *checkpoint.tensors[name][:2])


if __name__ == "__main__":
    main()
