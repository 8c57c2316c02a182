"""GPT-2 as an ONNX graph with a key/value cache, built from ONNX Runtime's fused operators where it has them.

optimum's export of the same model needs transformers before 5, gives the same ids, and takes 1.2 to 1.4 times as long
per token: ONNX Runtime turns it into 1203 nodes, this graph into 115, and the export copies the cache at every step.
"""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FUSED = {"GroupQueryAttention", "SkipLayerNormalization", "FastGelu"}  # ONNX Runtime's own, domain com.microsoft


class Graph:
    """Collects nodes and weights; a value is identified by its name."""

    def __init__(self):
        self.nodes, self.weights, self.inputs, self.outputs = [], [], [], []

    def node(self, kind, inputs, *outputs, **attributes):
        """Add a node and return the name of its first output."""
        domain = "com.microsoft" if kind in FUSED else ""
        self.nodes.append(helper.make_node(kind, inputs, outputs, outputs[0], domain=domain, **attributes))
        return outputs[0]

    def weight(self, name, array):
        self.weights.append(numpy_helper.from_array(np.asarray(array, order="C"), name))
        return name

    def input(self, name, kind, shape):
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def output(self, name, kind, shape):
        self.outputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def product(self, x, name, w, b):
        """Add x @ w, and return its name and that of the bias b, which the next node adds."""
        return self.node("MatMul", [x, self.weight(name + ".w", w)], name + ".product"), self.weight(name + ".b", b)

    def add_norm(self, x, name, y, y_bias, g, b):
        """Add x + y + y_bias and its layer norm, and return the names of both."""
        inputs = [x, y, self.weight(name + ".g", g), self.weight(name + ".b", b), y_bias]
        normed = self.node("SkipLayerNormalization", inputs, name, "", "", name + ".sum", epsilon=1e-5)
        return name + ".sum", normed


def attention(graph, i, x, c_attn, n_head, d):
    """Causal attention with the cache of layer i; past and present, bound to one buffer, are updated in place."""
    qkv = graph.node("Add", graph.product(x, f"{i}.c_attn", **c_attn), f"{i}.c_attn")
    shape = ["batch", n_head, "n_max", d]
    past = [graph.input(f"past_{what}.{i}", TensorProto.FLOAT, shape) for what in ("key", "value")]
    present = [graph.output(f"present_{what}.{i}", TensorProto.FLOAT, shape) for what in ("key", "value")]
    inputs = [qkv, "", "", *past, "last_key", "n_keys"]
    heads = {"num_heads": n_head, "kv_num_heads": n_head}
    return graph.node("GroupQueryAttention", inputs, f"{i}.attention", *present, **heads)


def embed(graph, wte, wpe):
    """Add token and position embeddings; also declares the inputs."""
    ids = graph.input("ids", TensorProto.INT64, ["batch", "n_seq"])
    positions = graph.input("positions", TensorProto.INT64, ["n_seq"])
    graph.input("last_key", TensorProto.INT32, ["batch"])  # n_keys - 1 for each row
    graph.input("n_keys", TensorProto.INT32, [])  # positions in the cache, with the new ones
    tokens = graph.node("Gather", [graph.weight("wte", wte), ids], "tokens")
    places = graph.node("Gather", [graph.weight("wpe", wpe), positions], "places")
    return graph.node("Add", [tokens, places], "embedded")


def build(wte, wpe, blocks, ln_f, n_head):
    """Build the graph for these weights: ids [batch, n_seq] -> logits of the last position, [batch, n_vocab]."""
    graph, d = Graph(), wte.shape[1] // n_head
    graph.output("logits", TensorProto.FLOAT, ["batch", wte.shape[0]])
    x = embed(graph, wte, wpe)
    first = [graph.weight(f"0.ln_1.{name}", blocks[0]["ln_1"][name]) for name in "gb"]
    normed = graph.node("LayerNormalization", [x, *first], "0.ln_1", epsilon=1e-5)
    for i, block in enumerate(blocks):
        attn, mlp = block["attn"], block["mlp"]
        a = attention(graph, i, normed, attn["c_attn"], n_head, d)
        a, b = graph.product(a, f"{i}.attn.c_proj", **attn["c_proj"])
        x, normed = graph.add_norm(x, f"{i}.ln_2", a, b, **block["ln_2"])
        a = graph.node("FastGelu", graph.product(normed, f"{i}.c_fc", **mlp["c_fc"]), f"{i}.gelu")
        a, b = graph.product(a, f"{i}.mlp.c_proj", **mlp["c_proj"])
        if i + 1 < len(blocks):
            x, normed = graph.add_norm(x, f"{i + 1}.ln_1", a, b, **blocks[i + 1]["ln_1"])
    last = graph.weight("last", np.array(-1))
    x, a = (graph.node("Gather", [y, last], name, axis=1) for y, name in ((x, "last_x"), (a, "last_a")))
    _, normed = graph.add_norm(x, "ln_f", a, b, **ln_f)
    graph.node("Gemm", [normed, "wte"], "logits", transB=1)
    return graph


def write(folder, params, n_head):
    """Write model.onnx and its weights to a new folder."""
    graph = build(**params, n_head=n_head)
    whole = helper.make_graph(graph.nodes, "gpt2", graph.inputs, graph.outputs, graph.weights)
    versions = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(whole, opset_imports=versions, ir_version=10)
    folder.mkdir()
    onnx.save_model(model, folder / "model.onnx", save_as_external_data=True, location="weights.bin")
