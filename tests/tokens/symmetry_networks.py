"""Small networks with the keys and the true depths of known architectures, whose symmetries are tested."""

import math

import torch
from torch import nn
from torch.nn import functional

RESNETS = {
    18: (2, [2, 2, 2, 2]), 34: (2, [3, 4, 6, 3]),
    50: (3, [3, 4, 6, 3]), 101: (3, [3, 4, 23, 3]), 152: (3, [3, 8, 36, 3]),
}  # fmt: skip


class ResidualBlock(nn.Module):
    """torchvision's BasicBlock (2 convolutions) and Bottleneck (3), also wide and grouped."""

    def __init__(self, inputs, planes, stride, depth, width, groups):
        super().__init__()
        outputs = planes * (4 if depth == 3 else 1)
        widths = [inputs, *[width if depth == 3 else planes] * (depth - 1), outputs]
        strided = depth - 1
        for place in range(1, depth + 1):
            kernel = 3 if depth == 2 or place == 2 else 1
            conv = nn.Conv2d(
                widths[place - 1], widths[place], kernel, stride if place == strided else 1, kernel // 2,
                groups=groups if place == 2 and depth == 3 else 1, bias=False,
            )  # fmt: skip
            self.add_module(f"conv{place}", conv)
            self.add_module(f"bn{place}", nn.BatchNorm2d(widths[place]))
        self.depth = depth
        self.downsample = None
        if stride != 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = x
        for place in range(1, self.depth + 1):
            y = getattr(self, f"bn{place}")(getattr(self, f"conv{place}")(y))
            y = functional.relu(y) if place < self.depth else y
        return functional.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """torchvision's ResNet; ``width_factor`` 2 is wide_resnet50_2."""

    def __init__(self, depth, groups=1, width_factor=1, planes=4):
        super().__init__()
        convolutions, counts = RESNETS[depth]
        self.conv1, self.bn1 = nn.Conv2d(3, planes, 3, 1, 1, bias=False), nn.BatchNorm2d(planes)
        inputs = planes
        for stage, count in enumerate(counts):
            blocks = []
            for block in range(count):
                stride = 2 if stage and not block else 1
                width = planes * width_factor
                blocks.append(ResidualBlock(inputs, planes, stride, convolutions, width, groups))
                inputs = planes * (4 if convolutions == 3 else 1)
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
            planes = planes * 2 if stage < 2 else planes + 2 * groups
        self.fc = nn.Linear(inputs, 5)

    def forward(self, x):
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(functional.adaptive_avg_pool2d(x, 1), 1))


class PreActivationBlock(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.convShortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

    def forward(self, x):
        normed = functional.relu(self.bn1(x))
        y = self.conv2(functional.relu(self.bn2(self.conv1(normed))))
        return y + (x if self.convShortcut is None else self.convShortcut(normed))


class Stage(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.layer = nn.Sequential(*blocks)

    def forward(self, x):
        return self.layer(x)


class WideResNet(nn.Module):
    """WRN-28 of re-basin code, narrow."""

    def __init__(self, blocks=4):
        super().__init__()
        self.conv1, inputs = nn.Conv2d(3, 4, 3, 1, 1, bias=False), 4
        for stage, width in enumerate((6, 8, 10), start=1):
            made = []
            for place in range(blocks):
                made.append(PreActivationBlock(inputs, width, 2 if stage > 1 and not place else 1))
                inputs = width
            self.add_module(f"block{stage}", Stage(made))
        self.bn1, self.fc = nn.BatchNorm2d(inputs), nn.Linear(inputs, 5)

    def forward(self, x):
        x = functional.relu(self.bn1(self.block3(self.block2(self.block1(self.conv1(x))))))
        return self.fc(functional.avg_pool2d(x, x.shape[-1]).flatten(1))


class VGG(nn.Module):
    """torchvision's VGG-11 and VGG-16, whose classifier reads 7 x 7 maps."""

    def __init__(self, depth, batch_norm):
        super().__init__()
        plans = {11: "4M6M66M88M88M", 16: "44M66M666M888M888M"}
        layers, inputs = [], 3
        for step in plans[depth]:
            if step == "M":
                layers.append(nn.MaxPool2d(2))
                continue
            norm = [nn.BatchNorm2d(int(step))] if batch_norm else []
            layers += [nn.Conv2d(inputs, int(step), 3, padding=1), *norm, nn.ReLU()]
            inputs = int(step)
        self.features, self.avgpool = nn.Sequential(*layers), nn.AdaptiveAvgPool2d(7)
        head = (nn.Linear(8 * 49, 12), nn.ReLU(), nn.Dropout(), nn.Linear(12, 10), nn.ReLU(), nn.Dropout())
        self.classifier = nn.Sequential(*head, nn.Linear(10, 5))

    def forward(self, x):
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


class AlexNet(nn.Module):
    """torchvision's AlexNet, narrow, with small strides, whose classifier reads 6 x 6 maps."""

    def __init__(self):
        super().__init__()
        relu, pool = nn.ReLU, nn.MaxPool2d(3, 2, 1)
        first = (nn.Conv2d(3, 4, 11, padding=5), relu(), pool, nn.Conv2d(4, 5, 5, padding=2), relu(), pool)
        middle = (nn.Conv2d(5, 6, 3, padding=1), relu(), nn.Conv2d(6, 6, 3, padding=1), relu())
        self.features = nn.Sequential(*first, *middle, nn.Conv2d(6, 5, 3, padding=1), relu(), pool)
        head = (nn.Dropout(), nn.Linear(5 * 36, 12), relu(), nn.Dropout(), nn.Linear(12, 10), relu())
        self.avgpool, self.classifier = nn.AdaptiveAvgPool2d(6), nn.Sequential(*head, nn.Linear(10, 5))

    def forward(self, x):
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


class Listed(nn.Module):
    """Modules in a list, used by a function in whatever way."""

    def __init__(self, modules, function):
        super().__init__()
        self.layers, self.function = nn.ModuleList(modules), function

    def forward(self, x):
        return self.function(x)


class PreActivationStage(nn.Module):
    """A block whose norms come before its convolutions, with a ResNet's keys."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1), nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = self.conv2(functional.relu(self.bn2(self.conv1(functional.relu(self.bn1(x))))))
        return y + (self.downsample(x) if hasattr(self, "downsample") else x)


class PreActivationResNet(nn.Module):
    def __init__(self, widths):
        super().__init__()
        self.conv1, inputs = nn.Conv2d(3, 8, 3, padding=1), 8
        for stage, width in enumerate(widths, start=1):
            self.add_module(f"layer{stage}", nn.Sequential(PreActivationStage(inputs, width)))
            inputs = width
        self.stages = len(widths)
        self.bn1, self.fc = nn.BatchNorm2d(8), nn.Linear(inputs, 4)
        self.last = inputs

    def forward(self, x):
        x = self.conv1(x)
        for stage in range(1, self.stages + 1):
            x = getattr(self, f"layer{stage}")(x)
        x = functional.relu(self.bn1(x) if self.last == 8 else x)
        return self.fc(x.mean((2, 3)))


class InvertedResidual(nn.Module):
    """MobileNet-V2's block, with torchvision's keys."""

    def __init__(self, inputs, outputs, hidden, stride):
        super().__init__()
        expand = nn.Sequential(nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6())
        depthwise = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False)
        middle = nn.Sequential(depthwise, nn.BatchNorm2d(hidden), nn.ReLU6())
        project = nn.Conv2d(hidden, outputs, 1, bias=False)
        self.conv = nn.Sequential(expand, middle, project, nn.BatchNorm2d(outputs))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x):
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNet(nn.Module):
    def __init__(self):
        super().__init__()
        stem = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU6())
        blocks = (InvertedResidual(4, 6, 8, 2), InvertedResidual(6, 6, 10, 1), InvertedResidual(6, 7, 9, 1))
        self.features = nn.Sequential(stem, *blocks)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(7, 5))

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


class DenseNet(nn.Module):
    """Each layer reads the concatenated outputs of all before it."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4 + 3 * place) for place in range(4))
        self.layers = nn.ModuleList(nn.Conv2d(4 + 3 * place, 3, 3, padding=1) for place in range(3))
        self.head = nn.Linear(13, 5)

    def forward(self, x):
        parts = [self.stem(x)]
        for norm, layer in zip(self.norms, self.layers, strict=False):
            parts.append(layer(functional.relu(norm(torch.cat(parts, 1)))))
        return self.head(functional.relu(self.norms[3](torch.cat(parts, 1))).mean((2, 3)))


class UNet(nn.Module):
    """Skips by concatenation, square transposed convolutions, group norms."""

    def __init__(self):
        super().__init__()
        self.down1, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.GroupNorm(3, 6)
        self.down2, self.down3 = nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.up2, self.merge2 = nn.ConvTranspose2d(8, 8, 2, 2), nn.Conv2d(16, 6, 3, padding=1)
        self.up1, self.merge1 = nn.ConvTranspose2d(6, 5, 2, 2), nn.Conv2d(11, 7, 3, padding=1)
        self.out = nn.Conv2d(7, 2, 1)

    def forward(self, x):
        first = functional.silu(self.norm(self.down1(x)))
        second = functional.relu(self.down2(functional.max_pool2d(first, 2)))
        third = functional.relu(self.down3(functional.avg_pool2d(second, 2)))
        y = functional.relu(self.merge2(torch.cat([self.up2(third), second], 1)))
        return self.out(functional.gelu(self.merge1(torch.cat([self.up1(y), first], 1))))


class Recurrent(nn.Module):
    """Token embedding, two bidirectional LSTM layers, a GRU, a head on the last step."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.lstm = nn.LSTM(6, 5, 2, batch_first=True, bidirectional=True)
        self.gru, self.head = nn.GRU(10, 7, batch_first=True), nn.Linear(7, 3)

    def forward(self, tokens):
        return self.head(self.gru(self.lstm(self.embedding(tokens))[0])[0][:, -1])


class Encoder(nn.Module):
    """torch's own transformer encoder with a learned position table."""

    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, 5, 12))
        layer = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True, activation="gelu")
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(12, 4)

    def forward(self, x):
        return self.head(self.encoder(x + self.position).mean(1))


class Conv1D(nn.Module):
    """GPT-2's linear layer, whose weight is [inputs, outputs]."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs) / 4), nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        return x @ self.weight + self.bias


class GPTAttention(nn.Module):
    def __init__(self, width, heads, linear):
        super().__init__()
        self.c_attn, self.c_proj, self.heads = linear(width, 3 * width), linear(width, width), heads
        self.register_buffer("bias", torch.tril(torch.ones(1, 1, 16, 16)).bool())

    def forward(self, x):
        B, S, D = x.shape
        q, k, v = (y.view(B, S, self.heads, -1).transpose(1, 2) for y in self.c_attn(x).split(D, dim=2))
        scores = q @ k.transpose(-1, -2) / math.sqrt(k.shape[-1])
        scores = scores.masked_fill(~self.bias[:, :, :S, :S], float("-inf"))
        return self.c_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, S, D))


class GPTBlock(nn.Module):
    def __init__(self, width, heads, linear):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(width), GPTAttention(width, heads, linear)
        self.ln_2, self.mlp = nn.LayerNorm(width), nn.Module()
        self.mlp.c_fc, self.mlp.c_proj = linear(width, 4 * width), linear(4 * width, width)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp.c_proj(functional.gelu(self.mlp.c_fc(self.ln_2(x)), approximate="tanh"))


class GPT(nn.Module):
    """Packed queries, keys and values, a causal mask, and a head that shares the embedding's weight."""

    def __init__(self, linear=Conv1D, width=12, heads=3):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(13, width), nn.Embedding(16, width)
        self.h = nn.ModuleList(GPTBlock(width, heads, linear) for _ in range(2))
        self.ln_f, self.lm_head = nn.LayerNorm(width), nn.Linear(width, 13, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, tokens):
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


class LlamaAttention(nn.Module):
    """Rotary positions; groups of query heads share keys and values."""

    def __init__(self, width, heads, shared):
        super().__init__()
        self.head, self.repeats = width // heads, heads // shared
        self.q_proj, self.o_proj = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(width, shared * self.head, bias=False) for _ in range(2))

    def forward(self, x, cos, sin):
        B, S, D = x.shape
        q, k, v = (p(x).view(B, S, -1, self.head).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = (y * cos + torch.cat([-y.chunk(2, -1)[1], y.chunk(2, -1)[0]], -1) * sin for y in (q, k))
        k, v = (
            y[:, :, None].expand(-1, -1, self.repeats, -1, -1).reshape(B, -1, S, self.head) for y in (k, v)
        )  # fmt: skip
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(B, S, D))


class LlamaLayer(nn.Module):
    def __init__(self, width, heads, shared):
        super().__init__()
        self.self_attn, self.mlp = LlamaAttention(width, heads, shared), nn.Module()
        self.mlp.gate_proj, self.mlp.up_proj = nn.Linear(width, 18, bias=False), nn.Linear(width, 18, bias=False)
        self.mlp.down_proj = nn.Linear(18, width, bias=False)
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(width), nn.RMSNorm(width)

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        y = self.post_attention_layernorm(x)
        return x + self.mlp.down_proj(functional.silu(self.mlp.gate_proj(y)) * self.mlp.up_proj(y))


class Llama(nn.Module):
    def __init__(self, width=24, heads=6, shared=3):
        super().__init__()
        self.embed_tokens, self.norm = nn.Embedding(13, width), nn.RMSNorm(width)
        self.layers = nn.ModuleList(LlamaLayer(width, heads, shared) for _ in range(2))
        self.lm_head = nn.Linear(width, 13, bias=False)
        angles = torch.arange(5)[:, None] * torch.tensor([1.0, 0.1]).repeat(2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens):
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        return self.lm_head(self.norm(x))


def _module(**children):
    module = nn.Module()
    for name, child in children.items():
        module.add_module(name, child)
    return module


class BertLayer(nn.Module):
    """BERT's keys, in the order of a norm after each residual."""

    def __init__(self, width=12, heads=4, hidden=20):
        super().__init__()
        linear, self.heads = nn.Linear, heads
        projections = _module(query=linear(width, width), key=linear(width, width), value=linear(width, width))
        output = _module(dense=linear(width, width), LayerNorm=nn.LayerNorm(width))
        self.attention = _module(self=projections, output=output)
        self.intermediate = _module(dense=linear(width, hidden))
        self.output = _module(dense=linear(hidden, width), LayerNorm=nn.LayerNorm(width))

    def forward(self, x):
        inner = self.attention.get_submodule("self")
        q, k, v = (
            p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (inner.query, inner.key, inner.value)
        )  # fmt: skip
        y = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.attention.output.LayerNorm(x + self.attention.output.dense(y))
        return self.output.LayerNorm(x + self.output.dense(functional.gelu(self.intermediate.dense(x))))


class ViTBlock(nn.Module):
    """timm's keys: one projection of queries, keys and values."""

    def __init__(self, width=12, heads=4, hidden=20):
        super().__init__()
        self.norm1, self.norm2, self.heads = nn.LayerNorm(width), nn.LayerNorm(width), heads
        self.attn = _module(qkv=nn.Linear(width, 3 * width), proj=nn.Linear(width, width))
        self.mlp = _module(fc1=nn.Linear(width, hidden), fc2=nn.Linear(hidden, width))

    def forward(self, x):
        B, S, D = x.shape
        q, k, v = self.attn.qkv(self.norm1(x)).reshape(B, S, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = ((q @ k.transpose(-2, -1) / 2).softmax(-1) @ v).transpose(1, 2).reshape(B, S, D)
        x = x + self.attn.proj(y)
        return x + self.mlp.fc2(functional.gelu(self.mlp.fc1(self.norm2(x))))


class ViT(nn.Module):
    def __init__(self):
        super().__init__()
        self.cls_token, self.pos_embed = nn.Parameter(torch.randn(1, 1, 12)), nn.Parameter(torch.randn(1, 5, 12))
        self.patch_embed = _module(proj=nn.Conv2d(3, 12, 4, 4))
        self.blocks, self.norm = nn.Sequential(ViTBlock(), ViTBlock()), nn.LayerNorm(12)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = self.patch_embed.proj(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


def trained(make, inputs):
    """The network in eval mode and float64, norms and scales random, running statistics after passes over inputs."""
    torch.manual_seed(0)
    network = make()
    with torch.no_grad():
        for key, value in network.named_parameters():
            if value.dim() == 1 and not key.endswith("bias"):
                value.uniform_(0.5, 1.5)
            elif value.dim() == 1:
                value.normal_(0, 0.3)
        for _ in range(3):
            network(inputs + torch.randn_like(inputs) if inputs.is_floating_point() else inputs)
    return network.double().eval(), inputs.double() if inputs.is_floating_point() else inputs
