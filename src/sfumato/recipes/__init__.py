"""Named, complete recipes. ``sfumato train NAME`` runs one; each docstring says what it costs and gives."""

from collections.abc import Callable

from sfumato.errors import UsageError
from sfumato.recipe import Recipe
from sfumato.recipes.clinic import (
    clinic,
    clinic_banded,
    clinic_both_ways,
    clinic_codebook,
    clinic_latents,
    clinic_mean_embedding,
    clinic_records,
    clinic_shared_latents,
    clinic_sound,
    clinic_sound_diffusion,
)
from sfumato.recipes.emoji import emoji, emoji_private
from sfumato.recipes.families import clinic_adversarial, clinic_variational
from sfumato.recipes.hospitals import hospitals
from sfumato.recipes.mnist import fashion_labels, fashion_mnist, mnist, mnist_labels
from sfumato.recipes.prompts import prompts
from sfumato.recipes.tokens import clinic_tokens, emails, wordnet

NAMED: dict[str, Callable[[], Recipe]] = {
    "clinic": clinic,
    "clinic-records": clinic_records,
    "clinic-sound": clinic_sound,
    "clinic-sound-diffusion": clinic_sound_diffusion,
    "clinic-banded": clinic_banded,
    "clinic-both-ways": clinic_both_ways,
    "clinic-latents": clinic_latents,
    "clinic-shared-latents": clinic_shared_latents,
    "clinic-codebook": clinic_codebook,
    "clinic-mean-embedding": clinic_mean_embedding,
    "hospitals": hospitals,
    "prompts": prompts,
    "clinic-variational": clinic_variational,
    "clinic-adversarial": clinic_adversarial,
    "clinic-tokens": clinic_tokens,
    "mnist": mnist,
    "fashion-mnist": fashion_mnist,
    "mnist-labels": mnist_labels,
    "fashion-labels": fashion_labels,
    "emoji": emoji,
    "emoji-private": emoji_private,
    "wordnet": wordnet,
    "emails": emails,
}


def named(name: str) -> Recipe:
    """The recipe of that name. Raises UsageError with the known names."""
    if name not in NAMED:
        raise UsageError(
            f"recipe = {name} · is neither a file nor one of {', '.join(NAMED)}",
            next="Name one of these, or give the path of a YAML file (`sfumato init` writes one).",
        )
    return NAMED[name]()
