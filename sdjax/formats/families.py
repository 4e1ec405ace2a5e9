"""The families of Stable Diffusion, and how files tell them apart."""

SD1, SD2, SDXL, REFINER = "Stable Diffusion 1", "Stable Diffusion 2", "SDXL", "SDXL refiner"

CONTEXT_WIDTHS = {768: SD1, 1024: SD2, 2048: SDXL, 1280: REFINER}
"""Width of the text that the U-Net attends to -> family."""

ARCHITECTURES = {
    SD1: "stable-diffusion-v1",
    SD2: "stable-diffusion-v2-512",
    SDXL: "stable-diffusion-xl-v1-base",
    REFINER: "stable-diffusion-xl-v1-refiner",
}
"""Family -> the value of `modelspec.architecture` in the metadata of safetensors files (ModelSpec 1.0.1)."""
