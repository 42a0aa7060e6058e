"""Registry of objectives by name: the rows of Table 1 (`terms`), the methods of `published`, and
objectives that other code registers.

A project adds a loss without a fork, in its configuration file or in a module that the file
imports:

    class Huber(posteriors.Regression): ...  # cost(prediction, target, where, given) -> LossSum

    registry.register_form("huber", (terms.token_term(terms.MIXED, 0, posterior=Huber()),))

An entropy term is registered in the same way, with predictions or alone.

`objective.forms=huber` then trains it like any other form. Code that reads the run later
(evaluation, `m3i_jax.load`) must import the same module first.
"""

from m3i_jax.objective import published, published_recent
from m3i_jax.objective import terms as objective_terms
from m3i_jax.objective.entropy_terms import AnyTerms, EntropyTerm
from m3i_jax.objective.terms import Term
from m3i_jax.registries import Registry, not_one_of

_FORMS: Registry[AnyTerms] = Registry(
    "form",
    reserved=(*objective_terms.LETTERS, *published.LEFT_OUT),
    unknown=lambda name, names: ValueError(
        not_one_of(
            repr(name), dict.fromkeys([*objective_terms.FORMS, *objective_terms.LETTERS, *names])
        )
    ),
)
for _name, _terms in {
    **objective_terms.FORMS,
    **objective_terms.TRANSFER,
    **{name: method.terms for name, method in published.PUBLISHED.items()},
    **published_recent.ENTROPIES,
}.items():
    _FORMS.register(_name, _terms)


def register_form(name: str, terms: AnyTerms) -> AnyTerms:
    """Register an objective under a name, for `objective.forms` and all lists of forms.

    Registering the same terms again has no effect, so a module may be imported twice.

    Args:
      name: letters, digits and underscores; not the name of another objective.
      terms: at least one, predictions and entropy terms; terms of equal name share a log line.

    Returns:
      The terms.

    Raises:
      ValueError: the name has other terms already or is not an identifier, or there is no term.

    >>> from m3i_jax.objective.terms import MASKED, token_term
    >>> _ = register_form("mim_huge_weight", (token_term(MASKED, 0, weight=9.0),))
    >>> form("mim_huge_weight")[0].weight
    9.0
    """
    if (
        not isinstance(terms, tuple)
        or not terms
        or not all(isinstance(term, Term | EntropyTerm) for term in terms)
    ):
        raise ValueError(
            f"form {name!r}: give a tuple of at least one Term or EntropyTerm, not {terms!r}"
        )
    return _FORMS.register(name, terms)


def form(name: str) -> AnyTerms:
    """Returns the terms of an objective by its name, or by its letter in the paper's Table 3.

    Raises:
      ValueError: an unknown name; the message has the reason or the closest name.

    >>> form("k") == form("sim")
    True
    """
    name = objective_terms.LETTERS.get(name, name)
    if name in published.LEFT_OUT:
        raise ValueError(f"{name!r} is not here: {published.LEFT_OUT[name]}")
    return _FORMS[name]


def forms() -> dict[str, AnyTerms]:
    """Returns all objectives by name, registered ones included.

    >>> {"m3i", "mae", "finetune"} <= forms().keys()
    True
    """
    return _FORMS.as_dict()
