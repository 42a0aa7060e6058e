"""One M3I step (categories, dynamic weighting) in plain PyTorch and timm, the peer of
tests.bench.torch_peer and tests.bench.accelerator. It does not use JAX: parameters, batch and
schedules are numpy arrays under the paths of the JAX parameter tree.

It is optimised: one encoder backward pass, timm's fused attention, fused AdamW, one foreach call
for the EMA, no unused rows of the last decoder layer, and no product that the formulas do not need.
"""

import functools
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import nn

Arrays = dict[str, np.ndarray]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _blocks(width: int, heads: int, depth: int, ratio: float) -> nn.ModuleList:
    norm = functools.partial(nn.LayerNorm, eps=1e-6)
    return nn.ModuleList(
        Block(width, heads, ratio, qkv_bias=True, norm_layer=norm) for _ in range(depth)
    )


class Encoder(nn.Module):
    """Vision transformer with a cls token, fixed positions, a frozen patch embedding and no final
    norm."""

    def __init__(
        self, width: int, heads: int, depth: int, ratio: float, patch: int, table: np.ndarray
    ) -> None:
        super().__init__()
        self.patch_embed = nn.Linear(3 * patch * patch, width).requires_grad_(False)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = _blocks(width, heads, depth, ratio)
        self.register_buffer("table", torch.from_numpy(table), persistent=False)

    def forward(self, patches: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        x = self.patch_embed(patches)
        x = x + self.table.to(x.dtype)
        # the residual stream has the precision of the products, as in the JAX model
        keep = None if keep is None else keep.to(x.dtype)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1).to(x.dtype), x], 1)
        for i, block in enumerate(self.blocks):
            if keep is None:
                x = x + block.attn(block.norm1(x))
                x = x + block.mlp(block.norm2(x))
            else:
                x = x + keep[:, i, 0, None, None] * block.attn(block.norm1(x))
                x = x + keep[:, i, 1, None, None] * block.mlp(block.norm2(x))
        return x


class Decoder(nn.Module):
    """Own tokens at their positions and one query per target position; the last layer computes only
    the rows of the queries."""

    def __init__(
        self, width_in: int, width: int, heads: int, depth: int, ratio: float, table: np.ndarray
    ) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(width_in, width), nn.Linear(width, width_in)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position_map = nn.Linear(2 * width, width)
        self.blocks = _blocks(width, heads, depth, ratio)
        self.register_buffer("table", torch.from_numpy(table), persistent=False)

    def forward(
        self, tokens: torch.Tensor, index: torch.Tensor, places: torch.Tensor
    ) -> torch.Tensor:
        own = self.embed(tokens)
        own = own + self.table[index].to(own.dtype)
        queries = self.position_map(places) + self.mask_token
        x = torch.cat([own, queries.to(own.dtype)], 1)
        for block in self.blocks[:-1]:
            x = x + block.attn(block.norm1(x))
            x = x + block.mlp(block.norm2(x))
        last, first = self.blocks[-1], own.shape[1]
        width, heads = x.shape[-1], last.attn.num_heads
        normed = last.norm1(x)
        weight, bias = last.attn.qkv.weight, last.attn.qkv.bias
        q = F.linear(normed[:, first:], weight[:width], bias[:width])
        k, v = F.linear(normed, weight[width:], bias[width:]).chunk(2, -1)
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
        x = x[:, first:] + last.attn.proj(
            F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        )
        x = x + last.mlp(last.norm2(x))
        return self.head(x)


class Pool(nn.Module):
    """Attention of the mean token over the tokens, with separate norms and without residual."""

    def __init__(self, width: int, heads: int, out: int) -> None:
        super().__init__()
        self.norm_query, self.norm_key, self.norm_value = (
            nn.LayerNorm(width, eps=1e-6) for _ in range(3)
        )
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out, self.heads = nn.Linear(width, out), heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.query(self.norm_query(x.mean(1, keepdim=True)))
        k, v = self.key(self.norm_key(x)), self.value(self.norm_value(x))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)[:, 0])


class Heads(nn.Module):
    def __init__(self, decoder: Decoder, pool: Pool, category: nn.Linear) -> None:
        super().__init__()
        self.decoder, self.pool, self.category = decoder, pool, category


def sincos(x: torch.Tensor, width: int) -> torch.Tensor:
    """[sin(x w_k), cos(x w_k)] with width / 4 frequencies."""
    k = torch.arange(width // 4, device=x.device, dtype=torch.float64)
    phase = x[..., None] * (10000.0 ** (-k / (width / 4))).float()
    return torch.cat([phase.sin(), phase.cos()], -1)


def relative(
    box_in: torch.Tensor,
    flip_in: torch.Tensor,
    box: torch.Tensor,
    flip: torch.Tensor,
    grid: int,
    width: int,
) -> torch.Tensor:
    """Raw embedding [B, N, 2 W] of every position of a target view relative to the input view."""
    centre = torch.arange(grid, device=box.device) + 0.5

    def axis_positions(axis: int, mirrored: bool) -> torch.Tensor:
        step = centre.expand(len(box), grid)
        if mirrored:
            step = torch.where(flip[:, None], grid - step, step)
        a, size = box_in[:, axis, None], box_in[:, axis + 2, None]
        reach = grid * (box[:, axis, None] - a) + box[:, axis + 2, None] * step
        if mirrored:
            reach = torch.where(flip_in[:, None], grid * size - reach, reach)
        return reach / size - 0.5

    rows, columns = sincos(axis_positions(0, False), width), sincos(axis_positions(1, True), width)
    ratio = sincos(10 * torch.log(box[:, 2:] / box_in[:, 2:]), width).flatten(1)
    parts = [rows[:, :, None].expand(-1, -1, grid, -1), columns[:, None].expand(-1, grid, -1, -1)]
    parts.append(ratio[:, None, None].expand(-1, grid, grid, -1))
    return torch.cat(parts, -1).flatten(1, 2)


def _partner(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def _energy(
    p: torch.Tensor, target: torch.Tensor, moment: torch.Tensor, weight: float
) -> torch.Tensor:
    """|p - t|^2 + w p'Cp per row, divided by its width; the gradient 2 w C p of the second part
    needs no product in the backward pass."""
    p = p.float()
    product = p.detach() @ moment
    value = (p - target).square() + weight * (2 * p * product - p.detach() * product)
    return value.sum(-1) / p.shape[-1]


class Peer:
    """The state and the step of a run.

    Args: shape: numbers of the model: width, heads, depth, ratio, patch, grid, hidden,
      decoder_width, decoder_heads, decoder_depth, pool_heads, pool_width, classes; and decay,
      second_moment, smoothing, gamma, balance_decay, clip, b1, b2, eps.
      arrays: parameters as params/..., by the paths of our tree; tables as table/encoder,
          table/decoder, table/identity.
      device: cpu or cuda.
      half: run matrix products in bfloat16, parameters and sums in float32.
      compiled: let torch.compile have encoder, decoder and pooling.
    """

    def __init__(
        self,
        shape: dict[str, Any],
        arrays: Arrays,
        *,
        device: str = "cpu",
        half: bool = False,
        compiled: bool = False,
    ) -> None:
        s = self.shape = shape
        make = lambda: Encoder(
            s["width"], s["heads"], s["depth"], s["ratio"], s["patch"], arrays["table/encoder"]
        )
        decoder = Decoder(
            s["width"],
            s["decoder_width"],
            s["decoder_heads"],
            s["decoder_depth"],
            s["ratio"],
            arrays["table/decoder"],
        )
        pool = Pool(s["width"], s["pool_heads"], s["pool_width"])
        self.encoder, self.target = make(), make().requires_grad_(False)
        self.heads = Heads(decoder, pool, nn.Linear(s["pool_width"], s["classes"]))
        self.identity = torch.from_numpy(arrays["table/identity"]).to(device)
        _load(self.encoder, arrays, "params/encoder/")
        _load(self.target, arrays, "params/encoder/")
        for name, part in self.heads.named_children():
            _load(part, arrays, f"params/{name}/")
        for module in (self.encoder, self.target, self.heads):
            module.to(device)
        trained = [*self.encoder.named_parameters(), *self.heads.named_parameters()]
        trained = [(name, p) for name, p in trained if p.requires_grad]
        plain = [p for name, p in trained if p.ndim == 1 or name.endswith("token")]
        decayed = [p for name, p in trained if not (p.ndim == 1 or name.endswith("token"))]
        groups = [
            {"params": decayed, "weight_decay": s["decay"]},
            {"params": plain, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=0.0, betas=(s["b1"], s["b2"]), eps=s["eps"], fused=True
        )
        self.trained = [p for _, p in trained]
        self.followed = [p for p in self.encoder.parameters() if p.requires_grad]
        self.following = [
            t
            for t, p in zip(self.target.parameters(), self.encoder.parameters(), strict=True)
            if p.requires_grad
        ]
        self.norms: torch.Tensor | None = None
        self.device, self.half = device, half
        self.mean, self.std = (
            torch.tensor(x, device=device)[None, None, None, None] for x in (MEAN, STD)
        )
        wrap = torch.compile if compiled else lambda module: module
        self._encode, self._encode_target = wrap(self.encoder), wrap(self.target)
        self._decode, self._pool = wrap(self.heads.decoder), wrap(self.heads.pool)

    def patches(self, views: torch.Tensor, flip: torch.Tensor) -> torch.Tensor:
        """[B, 2, S, S, 3] uint8 -> [2, B, N, 3 p p], flipped where `flip` [B, 2] is set, and
        normalised."""
        views = torch.where(flip[..., None, None, None], views.flip(-2), views)
        x = (views.float() / 255 - self.mean) / self.std
        b, grid, p = len(x), self.shape["grid"], self.shape["patch"]
        return (
            x.reshape(b, 2, grid, p, grid, p, 3)
            .permute(1, 0, 2, 4, 3, 5, 6)
            .reshape(2, b, grid * grid, -1)
        )

    def step(
        self, batch: dict[str, torch.Tensor], keep: torch.Tensor | None, lr: float, momentum: float
    ) -> dict[str, torch.Tensor]:
        """One optimizer step; returns its metrics."""
        s = self.shape
        weight = (
            torch.tensor(s["gamma"], device=self.device)
            if self.norms is None
            else s["gamma"] * self.norms[0] / self.norms[1]
        )
        with torch.autocast(self.device, torch.bfloat16, enabled=self.half):
            crops = self.patches(batch["views"], batch["flip"])
            with torch.no_grad():
                features = self._encode_target(crops.flatten(0, 1))[:, 1:].float()
            with torch.no_grad(), torch.autocast(self.device, enabled=False):
                targets = F.layer_norm(features, features.shape[-1:], eps=1e-5).unflatten(
                    0, (2, -1)
                )
                rows = targets.flatten(0, 2)
                moment = (rows.T @ rows) / len(rows)
                monitors = {
                    "target_std": (
                        features.unflatten(0, (2, -1))[0].flatten(0, 1).std(0, correction=0).mean()
                    )
                }
            mask = batch["mask"]
            mixed = torch.where(mask[..., None], crops[0], _partner(crops[0]))
            z = self._encode(mixed, keep)
            tokens = z.detach().requires_grad_()

            order = torch.argsort((~mask).int(), dim=1, stable=True)
            cells = order.split([mask.shape[1] - s["hidden"], s["hidden"]], 1)
            own, other = (
                tokens[:, 1:].gather(1, index[..., None].expand(-1, -1, s["width"]))
                for index in cells
            )
            box, flip = _partner(batch["box"]), _partner(batch["flip"])
            places = relative(
                box[:, 0], flip[:, 0], box[:, 1], flip[:, 1], s["grid"], s["decoder_width"]
            )
            both = torch.cat([own, other])
            predictions = self._decode(
                both, torch.cat(cells), torch.cat([self.identity.expand(len(own), -1, -1), places])
            )
            logits = self.heads.category(self._pool(both)).float()
        with torch.autocast(self.device, enabled=False):
            goal = torch.cat([targets[0], _partner(targets[1])])
            ssp = _energy(predictions, goal, moment, s["second_moment"]).mean()
            labels = torch.cat([batch["label"], _partner(batch["label"])])
            sp = F.cross_entropy(logits, labels, label_smoothing=s["smoothing"])

        decoder = list(self.heads.decoder.parameters())
        pooled = [*self.heads.pool.parameters(), *self.heads.category.parameters()]
        # both read the same gathered tokens
        dz_sp, *d_pooled = torch.autograd.grad(sp, [tokens, *pooled], retain_graph=True)
        dz_ssp, *d_decoder = torch.autograd.grad(ssp, [tokens, *decoder])
        norms = torch.stack([dz_ssp.float().norm(), dz_sp.float().norm()])
        self.optimizer.zero_grad(set_to_none=True)
        z.backward((dz_ssp + weight * dz_sp).to(z.dtype))
        for parameter, gradient in zip(decoder, d_decoder, strict=True):
            parameter.grad = gradient
        torch._foreach_mul_(d_pooled, weight)
        for parameter, gradient in zip(pooled, d_pooled, strict=True):
            parameter.grad = gradient
        norm = nn.utils.clip_grad_norm_(self.trained, s["clip"], foreach=True)
        loss = ssp.detach() + weight * sp.detach()
        # The fused kernels skip a step by this flag, without a transfer to the host.
        self.optimizer.found_inf = 1.0 - (torch.isfinite(loss) & torch.isfinite(norm)).float()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.following, self.followed, 1 - momentum)
        decay = s["balance_decay"]
        self.norms = norms if self.norms is None else decay * self.norms + (1 - decay) * norms
        return {"loss": loss, "ssp": ssp.detach(), "sp": sp.detach(), "grad_norm": norm, **monitors}


# {JAX name: timm name}
_NAMES = {
    "attention/qkv": "attn.qkv",
    "attention/out": "attn.proj",
    "mlp/fc1": "mlp.fc1",
    "mlp/fc2": "mlp.fc2",
}


def _load(module: nn.Module, arrays: Arrays, prefix: str) -> None:
    """Load JAX parameters into a module: kernels are transposed, stacked blocks unstacked."""
    state = {}
    for path, value in arrays.items():
        if not path.startswith(prefix):
            continue
        *where, last = path.removeprefix(prefix).split("/")
        last = {"kernel": "weight", "scale": "weight"}.get(last, last)
        if where and where[0] == "blocks":
            inner = "/".join(where[1:])
            for layer, one in enumerate(value):
                state[f"blocks.{layer}.{_NAMES.get(inner, inner)}.{last}"] = (
                    one.T if one.ndim == 2 else one
                )
        else:
            state[".".join([*where, last])] = value.T if value.ndim == 2 else value
    # strict: every parameter
    module.load_state_dict(
        {name: torch.from_numpy(np.array(value)) for name, value in state.items()}
    )


def batch_of(arrays: Arrays, device: str = "cpu") -> dict[str, torch.Tensor]:
    """The arrays of the batch, on a device."""
    tensors = {
        name.removeprefix("batch/"): torch.from_numpy(value).to(device)
        for name, value in arrays.items()
        if name.startswith("batch/")
    }
    tensors["label"] = tensors["label"].long()
    return tensors
