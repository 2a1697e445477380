"""The two networks, in Flax NNX: a classifier with dropout, and a transformer that predicts the next character.

`functional` turns a network into what a jitted step works with: its structure, static, and its parameters, a nested
dictionary of float32 arrays. `nnx.merge(structure, parameters)` is the network again.
"""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class Classifier(nnx.Module):
    """Two hidden layers, dropout after each."""

    def __init__(self, pixels: int, classes: int, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(pixels, 128, rngs=rngs)
        self.second = nnx.Linear(128, 64, rngs=rngs)
        self.last = nnx.Linear(64, classes, rngs=rngs)
        self.dropout = nnx.Dropout(0.2)

    def __call__(self, pixels: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Scores of shape (images, classes); without `rngs` nothing is dropped."""
        x = pixels
        for layer in (self.first, self.second):
            x = self.dropout(nnx.relu(layer(x)), deterministic=rngs is None, rngs=rngs)
        return self.last(x)


class Block(nnx.Module):
    """Causal attention and a feed-forward layer, each normalized on the way in and added to what came in."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs) -> None:
        self.heads = heads
        self.attention_norm = nnx.LayerNorm(width, rngs=rngs)
        self.attention_in = nnx.Linear(width, 3 * width, rngs=rngs)
        self.attention_out = nnx.Linear(width, width, rngs=rngs)
        self.forward_norm = nnx.LayerNorm(width, rngs=rngs)
        self.forward_in = nnx.Linear(width, 4 * width, rngs=rngs)
        self.forward_out = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """From (batch, context, width) to the same shape."""
        batch, context, width = x.shape
        joint = self.attention_in(self.attention_norm(x)).reshape(batch, context, 3, self.heads, width // self.heads)
        query, key, value = joint[:, :, 0], joint[:, :, 1], joint[:, :, 2]
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(mixed.reshape(x.shape))
        return x + self.forward_out(nnx.gelu(self.forward_in(self.forward_norm(x))))


class Transformer(nnx.Module):
    """Two blocks of width 64 between an embedding of characters and positions, and scores of the next character."""

    def __init__(self, vocabulary: int, context: int, rngs: nnx.Rngs, *, width: int = 64, blocks: int = 2) -> None:
        self.characters = nnx.Embed(vocabulary, width, rngs=rngs)
        self.positions = nnx.Embed(context, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, heads=4, rngs=rngs) for _ in range(blocks)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.scores = nnx.Linear(width, vocabulary, rngs=rngs)

    def __call__(self, characters: jax.Array) -> jax.Array:
        """From int32 (batch, context) to scores (batch, context, vocabulary)."""
        x = self.characters(characters) + self.positions(jnp.arange(characters.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.scores(self.norm(x))


def functional(network: nnx.Module) -> tuple[Any, Any]:
    """The network's structure and its parameters."""
    structure, state = nnx.split(network)
    return structure, nnx.to_pure_dict(state)


def kernels(params: Any) -> Any:
    """True for the matrices of linear layers: what weight decay acts on, sparing biases, norms and embeddings."""
    return jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", params)


def fingerprint(params: Any) -> str:
    """SHA-256 of the parameters' bytes: the same for two trees only if every bit is."""
    return hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params))).hexdigest()
