import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3i_jax import schema
from m3i_jax.models import decoder, heads, m3i, pooling, text
from m3i_jax.objective import derived_terms, positions, posteriors
from m3i_jax.objective import terms as objective_terms

# compiling is what takes the time here
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

CONFIG = schema.Config(
    data=schema.Data(image_size=12, caption_length=6),
    model=schema.Model(
        encoder=schema.Encoder(patch_size=4, width=8, depth=1, heads=2, mlp_ratio=2.0),
        decoder=schema.Decoder(width=12, depth=1, heads=2, mlp_ratio=2.0),
        pool=schema.Pool(width=100, heads=4),
        text=schema.Text(width=8, depth=1, heads=2, mlp_ratio=2.0, embed=50),
    ),
)


M3I = objective_terms.FORMS["m3i"]


def shapes(config=CONFIG, terms=M3I, classes=5, vocabulary=11):
    return jax.eval_shape(
        lambda key: m3i.init(config, key, terms, classes=classes, vocabulary=vocabulary),
        jax.random.key(0),
    )


@pytest.fixture(scope="module")
def params():
    return jit(lambda key: m3i.init(CONFIG, key, M3I, classes=5, vocabulary=11))(jax.random.key(0))


def test_parts_are_there_only_when_a_term_and_the_data_use_them():
    dense, text = {"encoder", "decoder"}, {"image_projection", "text", "logit_scale"}
    assert set(shapes()) == dense | {"pool", "category"} | text
    assert set(shapes(classes=0)) == dense | {"pool"} | text
    assert set(shapes(vocabulary=0)) == dense | {"pool", "category"}
    assert set(shapes(classes=0, vocabulary=0)) == dense
    assert set(shapes(terms=objective_terms.FORMS["supervised"])) == {"encoder", "pool", "category"}
    assert (
        set(shapes(terms=objective_terms.FORMS["weakly_supervised"])) == {"encoder", "pool"} | text
    )
    assert set(shapes(terms=objective_terms.FORMS["instance"])) == {"encoder", "heads"}
    assert set(
        shapes(
            terms=derived_terms.merge(
                objective_terms.FORMS["sim"], objective_terms.FORMS["supervised"]
            )
        )
    ) == dense | {"pool", "category"}
    assert all(
        leaf.dtype == jnp.float32 and not leaf.weak_type for leaf in jax.tree.leaves(shapes())
    )


DENSE_CL = (
    objective_terms.pooled_term(
        objective_terms.FULL,
        1,
        head=objective_terms.ProjectionHead(projector=objective_terms.MlpShape(layers=2)),
    ),
    objective_terms.token_term(
        objective_terms.FULL,
        1,
        head=objective_terms.ProjectionHead(
            name="dense",
            pool="none",
            projector=objective_terms.MlpShape(layers=2),
            match="likeness",
        ),
    ),
)
BEIT = objective_terms.Pass(masked=True, mask_tokens=True)


def test_heads_of_every_kind():
    assert set(shapes(terms=objective_terms.FORMS["mim_pixel"])["decoder"]) >= {
        "pixel_head",
        "pixel_norm",
    }
    assert "head" not in shapes(terms=objective_terms.FORMS["mim_pixel"])["decoder"]
    both = shapes(
        terms=derived_terms.merge(objective_terms.FORMS["mim"], objective_terms.FORMS["mim_pixel"])
    )["decoder"]
    assert {"pixel_head", "pixel_norm", "head"} <= set(both)
    assert {name: set(part) for name, part in shapes(terms=DENSE_CL)["heads"].items()} == {
        "global": {"projector"},
        "dense": {"projector"},
    }
    moco = shapes(terms=objective_terms.FORMS["mim_global"])["heads"]["global"]
    width = CONFIG.model.head.width
    assert (
        moco["projector"]["layer_2"]["kernel"].shape[-1]
        == moco["predictor"]["layer_1"]["kernel"].shape[-1]
        == width
    )
    msn = (
        objective_terms.pooled_term(
            objective_terms.MASKED,
            1,
            posterior=posteriors.Prototypes(),
            head=objective_terms.ProjectionHead(projector=objective_terms.MlpShape(layers=3)),
        ),
    )
    assert shapes(terms=msn)["heads"]["global"]["prototypes"].shape == (
        CONFIG.model.head.prototypes,
        width,
    )
    linear = (
        objective_terms.token_term(BEIT, 0, head=objective_terms.LinearHead()),
        objective_terms.pixel_term(BEIT, 0, head=objective_terms.LinearHead()),
    )
    made = shapes(terms=linear)
    assert set(made) == {"encoder", "heads"} and made["encoder"]["mask_token"].shape == (1, 1, 8)
    assert made["heads"]["linear_tokens"]["kernel"].shape == (8, 8) and made["heads"][
        "linear_pixels"
    ]["kernel"].shape == (8, 48)


def test_spaces_of_one_name_share_parameters_or_are_refused():
    mlp, other = objective_terms.MlpShape(layers=2), objective_terms.MlpShape(layers=3)
    head = objective_terms.ProjectionHead(projector=mlp, predictor=mlp)
    shared = (
        objective_terms.pooled_term(objective_terms.FULL, 1, head=head),
        objective_terms.pooled_term(
            objective_terms.FULL, 0, head=objective_terms.ProjectionHead(projector=mlp)
        ),
    )
    assert set(shapes(terms=shared)["heads"]["global"]) == {"projector", "predictor"}
    for bad in (
        objective_terms.ProjectionHead(projector=other, predictor=mlp),
        objective_terms.ProjectionHead(projector=mlp, predictor=other),
        objective_terms.ProjectionHead(),
    ):
        with pytest.raises(ValueError, match="'global'"):
            shapes(
                terms=(shared[0], objective_terms.pooled_term(objective_terms.FULL, 0, head=bad))
            )


def test_what_a_target_keeps():
    def parts(terms, config=CONFIG):
        kept = m3i.target_parts(config, terms, shapes(config, terms))
        assert kept.pop("encoder")
        return {
            name: {n: set(p) for n, p in part.items()} if name == "heads" else set(part)
            for name, part in kept.items()
        }

    sim = dataclasses.replace(CONFIG.model.decoder, projector_depth=2)
    deep = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, decoder=sim))
    assert parts(M3I) == {} and parts(objective_terms.FORMS["mim_pixel"], deep) == {}
    assert parts(M3I, deep) == {"decoder": {"embed", "projector"}}
    assert parts(DENSE_CL) == {"heads": {"global": {"projector"}, "dense": {"projector"}}}
    assert parts(objective_terms.FORMS["instance"], deep) == {"heads": {"global": {"projector"}}}
    for encoder in ("frozen", "shared"):
        assert parts(
            derived_terms.with_options(objective_terms.FORMS["instance"], target_encoder=encoder)
        ) == {"heads": {"global": {"projector"}}}
    online = (
        objective_terms.pooled_term(
            objective_terms.FULL, 1, encoder="online", posterior=posteriors.NTXent()
        ),
    )
    assert (
        parts(online) == {}
        and parts(
            (
                objective_terms.pooled_term(
                    objective_terms.FULL, 1, head=objective_terms.ProjectionHead()
                ),
            )
        )
        == {}
    )
    tree = shapes(terms=online)
    assert m3i.target_parts(CONFIG, online, tree)["encoder"] is tree["encoder"]


def test_a_part_starts_the_same_whatever_else_there_is(params):
    # the rest is not even compiled
    pool = jit(lambda key: m3i.init(CONFIG, key, M3I, classes=0, vocabulary=3)["pool"])
    jax.tree.map(np.testing.assert_array_equal, pool(jax.random.key(0)), params["pool"])
    assert (
        np.abs(pool(jax.random.key(1))["out"]["kernel"] - params["pool"]["out"]["kernel"]).max() > 0
    )
    small = dataclasses.replace(
        CONFIG, model=dataclasses.replace(CONFIG.model, head=schema.Head(hidden=9, width=5))
    )
    more = (objective_terms.FORMS["instance"], (*DENSE_CL[1:], *objective_terms.FORMS["instance"]))
    head, among = jit(
        lambda key: tuple(m3i.init(small, key, t, classes=0, vocabulary=0)["heads"] for t in more)
    )(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, head["global"], among["global"])
    assert not np.array_equal(
        among["dense"]["projector"]["layer_0"]["kernel"],
        among["global"]["projector"]["layer_0"]["kernel"],
    )


def test_parameter_table_of_the_paper():
    table = m3i.parameter_table(shapes(schema.Config(), M3I, 1000, 0))
    assert table == [
        ("encoder", 85_645_824),
        ("decoder", 30_713_856),
        ("pool", 2_366_976),
        ("category", 769_000),
    ]
    text = dict(m3i.parameter_table(shapes(schema.Config(), M3I, 0, 49_408)))
    assert list(text) == ["encoder", "decoder", "pool", "image_projection", "text", "logit_scale"]
    assert (text["image_projection"], text["text"], text["logit_scale"]) == (
        768 * 768,
        123_650_304,
        1,
    )
    assert [
        part for part, _ in m3i.parameter_table(shapes(terms=objective_terms.FORMS["instance"]))
    ] == ["encoder", "heads"]


def test_first_values_of_the_heads(params):
    assert float(params["logit_scale"]) == pytest.approx(2.6593, abs=1e-4)  # golden: ln(1 / 0.07)
    assert (
        np.abs(params["category"]["kernel"]).max() == pytest.approx(math.sqrt(6 / 105), rel=0.02)
        and not np.asarray(params["category"]["bias"]).any()
    )
    assert list(params["image_projection"]) == ["kernel"]
    assert np.std(params["image_projection"]["kernel"]) == pytest.approx(100**-0.5, rel=0.05)


def test_one_mixed_input_through_every_part(params):
    """bfloat16, all the way: shapes, precisions, finite numbers, and gradients that reach every
    part."""
    rng = np.random.default_rng(0)
    x, index = (
        jnp.asarray(rng.normal(size=(2, 9, 48)), jnp.float32),
        jnp.array([[0, 3, 4, 8], [1, 2, 5, 7]]),
    )
    tokens, length = jnp.array([[9, 1, 10, 0, 0, 0], [9, 3, 4, 10, 0, 0]]), jnp.array([3, 4])

    def forward(params):
        z = m3i.encode(CONFIG, params["encoder"], x)
        own = jnp.take_along_axis(z[:, 1:], index[..., None], 1)
        out = {
            "z": z,
            "rows": decoder.apply(
                CONFIG.model,
                params["decoder"],
                own,
                index,
                decoder.decoder_queries(
                    CONFIG.model, params["decoder"], positions.same_view_positions(3, 12)
                ),
                grid=3,
            ),
        }
        out["dense"] = decoder.prediction_head(
            CONFIG.model, params["decoder"], out["rows"], "tokens"
        )
        out["pooled"] = pooling.apply(CONFIG.model, params["pool"], own)
        out["logits"] = m3i.category_logits(params, out["pooled"])
        out["image"], out["text"] = (
            m3i.image_embedding(CONFIG, params, out["pooled"]),
            text.apply(CONFIG.model, params["text"], tokens, length),
        )
        total = jnp.square(out["dense"].astype(jnp.float32)).sum() + jnp.square(out["logits"]).sum()
        return total + (out["image"] * out["text"]).sum() * jnp.exp(params["logit_scale"]), out

    (_, out), grads = jit(jax.value_and_grad(forward, has_aux=True))(params)
    assert {name: (value.shape, value.dtype.name) for name, value in out.items()} == {
        "z": ((2, 10, 8), "bfloat16"),
        "rows": ((2, 9, 12), "bfloat16"),
        "dense": ((2, 9, 8), "bfloat16"),
        "pooled": ((2, 100), "bfloat16"),
        "logits": ((2, 5), "float32"),
        "image": ((2, 50), "float32"),
        "text": ((2, 50), "float32"),
    }
    assert all(
        np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves((out, grads))
    )
    silent = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree_util.tree_leaves_with_path(grads)
        if not np.asarray(leaf).any()
    }
    # frozen
    assert silent - {"pool/key/bias", "pool/norm_key/bias"} == {
        "encoder/patch_embed/kernel",
        "encoder/patch_embed/bias",
    }


def test_filled_inputs_linear_heads_and_projections_through_their_parts():
    terms = (
        objective_terms.token_term(BEIT, 0, head=objective_terms.LinearHead()),
        objective_terms.pixel_term(BEIT, 0, head=objective_terms.LinearHead()),
        objective_terms.pooled_term(objective_terms.FULL, 1, head=objective_terms.MOCO),
        objective_terms.pixel_term(objective_terms.MASKED, 1),
    )
    model = dataclasses.replace(
        CONFIG.model,
        head=schema.Head(hidden=9, width=5),
        decoder=dataclasses.replace(CONFIG.model.decoder, projector_depth=1),
    )
    config = dataclasses.replace(CONFIG, model=model)
    tree = shapes(config, terms)
    patches, index = jnp.zeros((2, 9, 48)), jnp.zeros((2, 4), int)

    def forward(params):
        z = m3i.encode(config, params["encoder"], patches, hidden=jnp.zeros((2, 9), bool))
        target, tokens, cls = (
            m3i.encode(config, params["encoder"], patches, blocks=1),
            z[:, 1:],
            z[:, 0],
        )
        query = decoder.decoder_queries(
            config.model, params["decoder"], positions.same_view_positions(3, 12)
        )[:6]
        rows = decoder.apply(
            config.model, params["decoder"], tokens[:, :4], index, query, grid=3, cls_BxD=cls
        )
        kept = m3i.target_parts(config, objective_terms.FORMS["instance"], params)["heads"]
        return {
            "pixels": decoder.prediction_head(config.model, params["decoder"], rows, "pixels"),
            "projected": decoder.project_targets(config.model, params["decoder"], target),
            "linear": [
                heads.apply_linear(config.model, params["heads"][f"linear_{of}"], tokens)
                for of in ("tokens", "pixels")
            ],
            "target": heads.apply_projector(
                config.model, kept["global"], objective_terms.MOCO, cls
            ),
            "prediction": heads.apply_predictor(
                config.model, params["heads"]["global"], objective_terms.MOCO, tokens
            ),
        }

    made = jax.tree.map(lambda leaf: leaf.shape, jax.eval_shape(forward, tree))
    assert made == {
        "pixels": (2, 6, 48),
        "projected": (2, 10, 12),
        "linear": [(2, 9, 8), (2, 9, 48)],
        "target": (2, 5),
        "prediction": (2, 9, 5),
    }


def test_pooling_by_cls():
    config = dataclasses.replace(
        CONFIG, model=dataclasses.replace(CONFIG.model, pool=schema.Pool(kind="cls", width=7))
    )
    tree = shapes(config, objective_terms.FORMS["supervised"])
    made = jax.eval_shape(
        lambda p: pooling.apply(
            config.model, p["pool"], jnp.zeros((2, 9, 8)), cls_BxD=jnp.zeros((2, 8))
        ),
        tree,
    )
    assert made.shape == (2, 7) and set(tree["pool"]) == {"norm", "out"}
