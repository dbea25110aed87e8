"""Where a patch's values stand in an image, and what becomes of one: what the kernels share.

Letters and math: patches_triton.py.  No side of a patch is divided by but when a kernel is compiled
and no size of a batch but once a program: a patch costs one division, by the grid's width, and a
second one in a clip.
"""

import triton
import triton.language as tl


@triton.jit
def offsets(
    p, s_c, s_t, s_h, s_w,
    C: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The channel of value p, and its offset from the first pixel of its patch."""
    q = p // C
    c = p - q * C
    r = q // PW
    x = q - r * PW
    if PT == 1:
        t, y = 0 * r, r
    else:
        t = r // PH
        y = r - t * PH
    if WIDE:
        offset = c.to(tl.int64) * s_c + t.to(tl.int64) * s_t
        offset += y.to(tl.int64) * s_h + x.to(tl.int64) * s_w
    else:
        offset = (c * s_c + t * s_t + y * s_h + x * s_w).to(tl.uint32)
    return c, offset


@triton.jit
def corner(
    place, gh, gw, s_t, s_h, s_w,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """The offset of the first pixel of a patch from its image's, int64."""
    row = place // gw
    right = (place - row * gw).to(tl.int64) * PW * s_w
    if FLAT:
        return row.to(tl.int64) * PH * s_h + right
    time = row // gh
    down = (row - time * gh).to(tl.int64) * PH * s_h
    return time.to(tl.int64) * PT * s_t + down + right


@triton.jit
def values(BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr):
    """The values of a patch.  Where a block is of one alone, neighboring lanes take neighbors."""
    p = tl.arange(0, BLOCK_P)
    if BLOCK_N == 1:
        p = tl.max_contiguous(p, 1)
    return p


@triton.jit
def block(K, SOME: tl.constexpr):
    """A program's image, int64, and the first of its SOME patches of the image's K."""
    blocks = tl.cdiv(K, SOME)
    image = tl.program_id(0) // blocks
    return image.to(tl.int64), (tl.program_id(0) - image * blocks) * SOME


@triton.jit
def rows(k, K, BLOCK_N: tl.constexpr):
    """Which of the patches k there are, (BLOCK_N, 1): of one alone it is known."""
    if BLOCK_N == 1:
        here = tl.full((1, 1), True, tl.int1)
    else:
        here = (k < K)[:, None]
    return here


@triton.jit
def corners(
    IDS, k, K, gh, gw, s_t, s_h, s_w,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Offsets of the first pixels of an image's patches k, whose ids stand at IDS."""
    place = tl.load(IDS + k, k < K, 0)
    if not WIDE:
        place = place.to(tl.int32)
    return corner(place, gh, gw, s_t, s_h, s_w, PT, PH, PW, FLAT)


@triton.jit
def moments(NORM, c, inside, C: tl.constexpr):
    """What channels c are normalized by: what is taken off, and the factor."""
    if NORM is None:
        off, factor = 0.0, 1.0
    else:
        off, factor = tl.load(NORM + c, inside, 0.0), tl.load(NORM + C + c, inside, 0.0)
    return off, factor


@triton.jit
def affine(x, off, factor, NORM):
    """x in float32, normalized."""
    x = x.to(tl.float32)
    if NORM is not None:
        x = (x - off) * factor
    return x


@triton.jit
def piece(
    IMAGES, NORM, p, s_c, s_t, s_h, s_w,
    C: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Values p of the patch whose first pixel stands at IMAGES, and which of them there are."""
    ok = p < C * PT * PH * PW
    c, within = offsets(p, s_c, s_t, s_h, s_w, C, PT, PH, PW, WIDE)
    off, factor = moments(NORM, c, ok, C)
    return affine(tl.load(IMAGES + within, ok, 0.0), off, factor, NORM), ok


@triton.jit
def inverse(var, eps):
    return tl.div_rn(1.0, tl.sqrt_rn(var + eps))


@triton.jit
def loss_of(e, KIND: tl.constexpr):
    if KIND == 0:
        return e * e
    size = tl.abs(e)
    if KIND == 1:
        return size
    return tl.where(size < 1.0, 0.5 * e * e, size - 0.5)


@triton.jit
def slope_of(e, KIND: tl.constexpr):
    if KIND == 0:
        return 2.0 * e
    if KIND == 1:
        return tl.where(e > 0, 1.0, tl.where(e < 0, -1.0, e))  # a NaN stays one
    return tl.where(e > 1.0, 1.0, tl.where(e < -1.0, -1.0, e))
