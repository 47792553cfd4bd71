"""The DeepSeek-V3 architecture for training, as torch modules.

Attribute paths are the released tensor names, so `state_dict()` is the checkpoint.
Shapes in comments: B sequences, S positions, T = B*S rows, H hidden, K experts per
token. The residual stream is float32; matrix products run in bfloat16 through
autocast. Equation numbers are those of the DeepSeek-V3 technical report.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

# What the demo checkpoint is. Everything the modules below read is in here.
DEMO = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 2048,
    "hidden_size": 192,
    "intermediate_size": 512,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "n_routed_experts": 32,
    "ep_size": 1,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 64,
    "q_lora_rank": 96,
    "qk_rope_head_dim": 16,
    "v_head_dim": 48,
    "qk_nope_head_dim": 32,
    "topk_method": "noaux_tc",
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 4,
    "moe_layer_freq": 1,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "num_nextn_predict_layers": 1,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "use_cache": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
    "rope_theta": 10000,
    "rope_scaling": None,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "torch_dtype": "bfloat16",
}


def linear(inputs, outputs, gain=1.0):
    """A projection without bias whose output has `gain` times the input's variance root."""
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=gain / math.sqrt(inputs))
    return layer


class Norm(nn.RMSNorm):
    """RMSNorm in float32 whatever comes in."""

    def __init__(self, width, eps):
        super().__init__(width, eps=eps)

    def forward(self, x):
        return super().forward(x.float())


def rotate(x, angles):
    """RoPE on [..., S, d]: element pairs (0,1), (2,3), … turn by `angles` [S, d/2]."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Multi-head latent attention (eq. 1 to 11), unabsorbed: training has no cache."""

    def __init__(self, c, gain):
        super().__init__()
        h, n, eps = c["hidden_size"], c["num_attention_heads"], c["rms_norm_eps"]
        self.heads, self.nope, self.rope = n, c["qk_nope_head_dim"], c["qk_rope_head_dim"]
        self.value, self.latent = c["v_head_dim"], c["kv_lora_rank"]
        self.q_a_proj = linear(h, c["q_lora_rank"])
        self.q_a_layernorm = Norm(c["q_lora_rank"], eps)
        self.q_b_proj = linear(c["q_lora_rank"], n * (self.nope + self.rope))
        self.kv_a_proj_with_mqa = linear(h, self.latent + self.rope)
        self.kv_a_layernorm = Norm(self.latent, eps)
        self.kv_b_proj = linear(self.latent, n * (self.nope + self.value))
        self.o_proj = linear(n * self.value, h, gain)

    def forward(self, x, angles):
        split = lambda y: y.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, S, d]
        q = split(self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))))
        q_nope, q_pe = q.split([self.nope, self.rope], -1)
        c_kv, k_pe = self.kv_a_proj_with_mqa(x).split([self.latent, self.rope], -1)
        kv = split(self.kv_b_proj(self.kv_a_layernorm(c_kv)))
        k_nope, v = kv.split([self.nope, self.value], -1)
        k_pe = rotate(k_pe, angles).unsqueeze(1).expand(-1, self.heads, -1, -1)  # shared by all heads
        q = torch.cat([q_nope, rotate(q_pe, angles)], -1)
        k = torch.cat([k_nope, k_pe], -1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(-2))


class Mlp(nn.Module):
    """SwiGLU: the dense layer, a shared expert or one routed expert."""

    def __init__(self, hidden, inner, gain):
        super().__init__()
        self.gate_proj = linear(hidden, inner)
        self.up_proj = linear(hidden, inner)
        self.down_proj = linear(inner, hidden, gain)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Gate(nn.Module):
    """Group-limited sigmoid top-k with a selection bias (eq. 13 to 16)."""

    def __init__(self, c):
        super().__init__()
        experts = c["n_routed_experts"]
        self.weight = nn.Parameter(torch.randn(experts, c["hidden_size"]) / math.sqrt(c["hidden_size"]))
        self.register_buffer("e_score_correction_bias", torch.zeros(experts))
        self.register_buffer("load", torch.zeros(experts), persistent=False)
        self.groups, self.kept = c["n_group"], c["topk_group"]
        self.top_k, self.scale = c["num_experts_per_tok"], c["routed_scaling_factor"]

    def forward(self, x):
        """x [T, H] -> experts [T, K], weights [T, K]. The bias decides who, never how much."""
        with torch.autocast("cpu", enabled=False):
            scores = F.linear(x.float(), self.weight).sigmoid()
        with torch.no_grad():
            biased = scores + self.e_score_correction_bias
            grouped = biased.unflatten(-1, (self.groups, -1))
            best = grouped.topk(2, -1).values.sum(-1).topk(self.kept, -1).indices
            barred = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(-1, best, False)
            chosen = grouped.masked_fill(barred.unsqueeze(-1), -math.inf).flatten(-2).topk(self.top_k, -1).indices
            self.load += torch.bincount(chosen.flatten(), minlength=self.load.numel())
        weights = scores.gather(-1, chosen)
        return chosen, weights / weights.sum(-1, keepdim=True) * self.scale

    @torch.no_grad()
    def balance(self, speed):
        """Moves each expert's bias one step against its load and starts a new count.

        Returns the busiest expert's load over the mean.
        """
        mean = self.load.mean()
        peak = float(self.load.max() / mean.clamp_min(1.0))
        self.e_score_correction_bias += speed * torch.sign(mean - self.load)
        self.load.zero_()
        return peak


class Moe(nn.Module):
    """Shared expert plus the weighted sum of the chosen routed experts (eq. 12)."""

    def __init__(self, c, gain):
        super().__init__()
        hidden, inner = c["hidden_size"], c["moe_intermediate_size"]
        self.gate = Gate(c)
        self.experts = nn.ModuleList(Mlp(hidden, inner, gain) for _ in range(c["n_routed_experts"]))
        self.shared_experts = Mlp(hidden, inner * c["n_shared_experts"], gain)

    def forward(self, x):
        flat = x.flatten(0, 1)  # [T, H]
        chosen, weights = self.gate(flat)
        # Assignments sorted by expert: each expert then reads one contiguous run of rows.
        order = chosen.flatten().argsort(stable=True)
        source = order // chosen.shape[1]
        runs = flat[source].split(torch.bincount(chosen.flatten(), minlength=len(self.experts)).tolist())
        done = torch.cat([expert(run) for expert, run in zip(self.experts, runs)]).float()
        done = done * weights.flatten()[order].unsqueeze(-1)
        routed = torch.zeros_like(flat).index_add(0, source, done)
        return routed.view_as(x) + self.shared_experts(x)


class Layer(nn.Module):
    """One decoder layer: attention, then a dense or an expert MLP, each on a residual."""

    def __init__(self, c, moe):
        super().__init__()
        hidden, eps = c["hidden_size"], c["rms_norm_eps"]
        gain = 1.0 / math.sqrt(2 * c["num_hidden_layers"])  # what enters the residual starts small
        self.input_layernorm = Norm(hidden, eps)
        self.self_attn = Attention(c, gain)
        self.post_attention_layernorm = Norm(hidden, eps)
        self.mlp = Moe(c, gain) if moe else Mlp(hidden, c["intermediate_size"], gain)

    def forward(self, x, angles):
        x = x + self.self_attn(self.input_layernorm(x), angles)
        return x + self.mlp(self.post_attention_layernorm(x))


class SharedHead(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm = Norm(c["hidden_size"], c["rms_norm_eps"])


class MtpLayer(Layer):
    """Multi-token prediction (eq. 21 to 23): a further layer that sees the next token.

    The released order is embedding first, hidden state second.
    """

    def __init__(self, c):
        super().__init__(c, moe=True)
        hidden, eps = c["hidden_size"], c["rms_norm_eps"]
        self.enorm, self.hnorm = Norm(hidden, eps), Norm(hidden, eps)
        self.eh_proj = linear(2 * hidden, hidden)
        self.shared_head = SharedHead(c)

    def forward(self, embedded, hidden, angles):
        joined = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(hidden)], -1)).float()
        return self.shared_head.norm(super().forward(joined, angles))


class Trunk(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.embed_tokens = nn.Embedding(c["vocab_size"], c["hidden_size"])
        nn.init.normal_(self.embed_tokens.weight, std=0.5)
        main = [Layer(c, moe=i >= c["first_k_dense_replace"]) for i in range(c["num_hidden_layers"])]
        self.layers = nn.ModuleList(main + [MtpLayer(c) for _ in range(c["num_nextn_predict_layers"])])
        self.norm = Norm(c["hidden_size"], c["rms_norm_eps"])


class Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)
        nn.init.normal_(self.lm_head.weight, std=config["initializer_range"])
        d = config["qk_rope_head_dim"]
        turns = config["rope_theta"] ** (-torch.arange(0, d, 2).float() / d)
        positions = torch.arange(config["max_position_embeddings"]).float()
        self.register_buffer("angles", torch.outer(positions, turns), persistent=False)

    def gates(self):
        """Every router, the MTP layer's last."""
        return [layer.mlp.gate for layer in self.model.layers if isinstance(layer.mlp, Moe)]

    def losses(self, window):
        """window [B, S+2] token ids -> (next-token loss, loss of the token after the next)."""
        inputs, following, second = window[:, :-2], window[:, 1:-1], window[:, 2:]
        angles = self.angles[: inputs.shape[1]]
        hidden = self.model.embed_tokens(inputs)
        *main, mtp = self.model.layers
        for layer in main:
            hidden = layer(hidden, angles)
        hidden = self.model.norm(hidden)
        drafted = mtp(self.model.embed_tokens(following), hidden, angles)
        return self.loss(hidden, following), self.loss(drafted, second)

    def loss(self, normed, target):
        return F.cross_entropy(self.lm_head(normed).float().flatten(0, 1), target.flatten())

    def checkpoint(self):
        """Tensor name -> tensor as released: bfloat16, selection bias float32, MTP repeats included."""
        tensors = dict(self.state_dict())
        prefix = f"model.layers.{self.config['num_hidden_layers']}."
        tensors[prefix + "embed_tokens.weight"] = self.model.embed_tokens.weight
        tensors[prefix + "shared_head.head.weight"] = self.lm_head.weight
        kept = torch.float32
        return {
            name: value.detach().to(kept if name.endswith("bias") else torch.bfloat16).clone().contiguous()
            for name, value in tensors.items()
        }
