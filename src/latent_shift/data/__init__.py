"""From captioned videos to what training reads: readers, packing, stores, latents."""
