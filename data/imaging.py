"""Pictures: PIL and tensors, one resize-and-crop, contact sheets."""
import math

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps


def as_rgb(image):
    """A PIL image of any mode as upright RGB, 8 bits; what is transparent is composited on white.
    Raises ValueError on pixels whose range the file does not tell."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # convert() would clip 16-bit gray to white, floats to 0
        levels = np.asarray(image)
        # I has 32 bits, as which older versions of Pillow open a PNG of 16; 0 to 255 may be all its range
        unclear = image.mode == "F" or image.mode == "I" and levels.max() < 256
        if unclear or levels.min() < 0 or levels.max() > 65535:
            raise ValueError("neither 8 nor 16 bits a pixel")
        image = Image.fromarray((levels // 256).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def square(image, size):
    """A PIL image brought to size x size: the shorter side resized to it (Lanczos), then the center
    cropped, rounded as torchvision's Resize and CenterCrop do. Of a strip beyond 16:1 only the
    middle is resized: all of 4000 x 1 would take 1 GB at size 256."""
    short = min(image.size)
    # on either side: the center stays in place
    outside = [max(0, (side - 16 * short) // 2) for side in image.size]
    if any(outside):
        image = image.crop((*outside, image.width - outside[0], image.height - outside[1]))
    width, height = (size if side == short else int(size * side / short) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.resize((width, height), Image.Resampling.LANCZOS).crop((left, top, left + size, top + size))


def tensor(pictures):
    """RGB PIL images of one size to float (N, 3, H, W) in [-1, 1]."""
    pixels = (torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures)
    return torch.stack([levels.float() / 127.5 - 1 for levels in pixels])


def to_pil(images, scale=1):
    """float (N, 3, H, W) in [-1, 1] to a list of PIL images, each pixel drawn scale x scale."""
    pixels = ((images + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(np.ascontiguousarray(p)).resize((p.shape[1] * scale, p.shape[0] * scale),
                                                            Image.Resampling.NEAREST)
            for p in pixels]


def beside(left, right):
    """Two pictures of one height as one."""
    canvas = Image.new("RGB", (left.width + right.width, left.height), "white")
    canvas.paste(left, (0, 0))
    canvas.paste(right, (left.width, 0))
    return canvas


def contact_sheet(rows, columns=(), labels=(), gap=4):
    """One picture out of rows of PIL images of one size; columns: a title per column;
    labels: a title per row, cut to 40 letters."""
    labels = [label if len(label) <= 40 else label[:37] + "..." for label in labels]
    width, height = rows[0][0].size
    font = ImageFont.load_default(size=max(11, height // 7))
    left = 10 + max((math.ceil(font.getlength(label)) for label in labels), default=-10)
    top = 3 * font.size if columns else 0
    count = max(len(row) for row in rows)
    canvas = Image.new("RGB", (left + count * (width + gap), top + len(rows) * (height + gap)), "white")
    pen = ImageDraw.Draw(canvas)
    for j, title in enumerate(columns):
        pen.text((left + j * (width + gap) + width / 2, top / 2), title, "black", font, anchor="mm")
    for i, row in enumerate(rows):
        if labels:
            pen.text((left - 6, top + i * (height + gap) + height / 2), labels[i], "black", font, anchor="rm")
        for j, image in enumerate(row):
            canvas.paste(image, (left + j * (width + gap), top + i * (height + gap)))
    return canvas
