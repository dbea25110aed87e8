"""Views made: by torchvision or by DALI, from the same draws."""
