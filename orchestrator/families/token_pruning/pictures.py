"""Pictures of a token-pruning network: dropped tokens (figure 6), identities (figure 4), the training views."""

# Shape legend: B = images, S = stages, N = image tokens, D = width of the class token, G = gallery.

import numpy as np
import torch
from torch import Tensor, nn

from models.token_pruning import PrunedViT
from orchestrator.families.retrieval.search import Found, panel
from orchestrator.families.token_pruning.opened import Opened, inputs
from orchestrator.families.token_pruning.recipe import PruningRecipe
from orchestrator.families.token_pruning.views import LoadViews, augmentations, requests
from orchestrator.pictures import Picture, Points, Sheet


def pictures(
    recipe: PruningRecipe, opened: Opened, student: PrunedViT, found: Found, device: torch.device
) -> dict[str, Picture]:
    """All of them, by name."""
    drawn: dict[str, Picture] = {
        "retrieval": panel(opened.data, found, opened.frames["query"], opened.frames["gallery"]),
        "identities": _identity_map(opened, found),
        "views": _view_sheet(recipe, opened),
    }
    if recipe.hts:
        drawn["tokens"] = _token_sheet(opened, student, device)
    return drawn


@torch.no_grad()
def _token_sheet(opened: Opened, student: PrunedViT, device: torch.device) -> Sheet:
    """A few queries and what is left of each after each stage; dropped patches are whitened."""
    chosen = np.unique(np.linspace(0, len(opened.data.query) - 1, 8).astype(int))
    frames_B3HW = torch.as_tensor(opened.frames["query"](chosen))
    _, masks_BSN = student.eval().masked(*inputs(student, opened, "query", chosen, device))
    kept = masks_BSN.cpu().view(len(frames_B3HW), -1, *student.backbone.patch_embed.grid_size)
    kept = nn.functional.interpolate(kept, frames_B3HW.shape[2:])[:, :, None].bool()
    shown = torch.where(kept, frames_B3HW[:, None], (frames_B3HW[:, None] // 8 + 223).to(torch.uint8))
    shown = torch.cat([frames_B3HW[:, None], shown], dim=1).permute(0, 1, 3, 4, 2).numpy()
    # Images side by side, stages below each other.
    counts = student.counts if student.config.inference == "topk" else ("",) * 3
    names = ("image", *(f"stage {s}: {n}" for s, n in enumerate(counts, 1)))
    return Sheet("Tokens that are left after each stage", shown.swapaxes(0, 1), ("",) * len(frames_B3HW), names)


def _identity_map(opened: Opened, found: Found) -> Points:
    """t-SNE of a few identities' queries and gallery images, for the student and, where there is one, its teacher."""
    from sklearn.manifold import TSNE

    data = opened.data
    identities = np.unique(data.query.identity)
    chosen = identities[np.linspace(0, len(identities) - 1, min(10, len(identities))).astype(int)]
    sides = {
        side: np.flatnonzero(np.isin(images.identity, chosen))[:400]
        for side, images in (("query", data.query), ("gallery", data.gallery))
    }
    label = np.concatenate([getattr(data, side).identity[rows] for side, rows in sides.items()])
    marked = np.concatenate([np.full(len(rows), side == "query") for side, rows in sides.items()])
    own = {"query": found.query_QD.cpu(), "gallery": found.gallery_GD.cpu()}
    embedded: dict[str, Tensor] = {"student": torch.cat([own[side][torch.from_numpy(r)] for side, r in sides.items()])}
    if opened.taught:
        embedded["teacher"] = torch.from_numpy(np.concatenate([opened.taught[s](rows) for s, rows in sides.items()]))
    maps = {}
    for name, rows_ND in embedded.items():
        perplexity = max(2.0, min(20.0, (len(rows_ND) - 1) / 4))
        unit = nn.functional.normalize(rows_ND.float(), dim=1).numpy()
        maps[name] = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(unit)
    return Points("A few identities (t-SNE of normalised embeddings)", maps, label, marked, ("gallery", "query"))


def _view_sheet(recipe: PruningRecipe, opened: Opened, images: int = 8) -> Sheet:
    """Training images and the views that the networks see of them."""
    load = LoadViews.of(recipe, opened, 1, 0, 1)
    indices, drawn, key = next(requests(recipe, opened.data.train, 1, 0, 1))
    batch = load((indices[:images], [d[:images] for d in drawn], key))
    rows, augments = [batch["frames"]], augmentations(recipe)
    for augment, draws, overlay in zip(augments, batch["draws"], batch["overlays"], strict=True):
        shown = augment(batch["frames"], draws, overlay, "half")
        rows.append(((shown * 0.5 + 0.5).clamp(0, 1) * 255).to(torch.uint8))
    names = ("image", *(f"view {v}" + (": NODA" if a.occlude else "") for v, a in enumerate(augments, 1)))
    stacked = torch.stack(rows).permute(0, 1, 3, 4, 2).numpy()
    return Sheet("What training sees", stacked, ("",) * stacked.shape[1], names)
