"""What random views of an item are: the specs of images and of all other kinds, and the presets."""
