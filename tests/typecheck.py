"""Runtime checks of annotated shapes: the type checker that jaxtyping's import hook puts around every function of the package."""

from beartype import BeartypeConf, beartype

typecheck = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is fine where a float is meant
