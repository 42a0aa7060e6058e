"""Objectives that other code registers: available like all others, and unable to replace
another."""

import pytest

import m3i_jax
from m3i_jax.errors import UserError
from m3i_jax.objective import published, registry, terms
from m3i_jax.training import plan

TERMS = (terms.token_term(terms.MASKED, 0, name="registered"),)


def test_registered_form_is_available_and_suggested():
    assert (
        m3i_jax.register_form("registered_form", TERMS)
        == TERMS
        == plan.terms_named("registered_form")
    )
    # as by a second import of the module
    assert registry.register_form("registered_form", TERMS) == TERMS
    with pytest.raises(
        UserError,
        match=(
            r"^config.objective.forms: 'registred_form' is not one of .*; did you mean"
            r" registered_form\?$"
        ),
    ):
        plan.terms_named("registred_form")


def test_every_form_has_its_terms():
    found = registry.forms()
    assert found.keys() >= {*terms.FORMS, *terms.TRANSFER, *published.PUBLISHED}
    assert all(registry.form(name) == terms for name, terms in found.items())
    assert all(registry.form(letter) == terms.FORMS[name] for letter, name in terms.LETTERS.items())


@pytest.mark.parametrize("name", ["m3i", "mae", "finetune", "k", "beit"])
def test_a_form_cannot_be_replaced(name):
    with pytest.raises(ValueError, match=f"form '{name}' exists already"):
        registry.register_form(name, TERMS)


@pytest.mark.parametrize(
    ("name", "terms"),
    [("a+b", TERMS), ("", TERMS), ("empty", ()), ("one", TERMS[0]), ("other", ("m3i",))],
)
def test_invalid_forms_are_refused(name, terms):
    with pytest.raises(ValueError, match=f"^form '{name.replace('+', '.')}': "):
        registry.register_form(name, terms)


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_a_weight_by_which_nothing_can_be_averaged_is_refused(weight):
    with pytest.raises(ValueError, match=f"^term registered: weight is {weight}"):
        terms.token_term(terms.MASKED, 0, name="registered", weight=weight)


def test_every_module_of_the_package_is_an_attribute():
    """Also of one that nothing has imported yet."""
    import m3i_jax.objective

    for name in ("caption_posterior", "derived_terms", "prototype_targets", "published_recent"):
        assert m3i_jax.objective.__getattr__(name).__name__ == f"m3i_jax.objective.{name}"
