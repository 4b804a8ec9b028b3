"""The stages of the GPU check; each module has `cases(device, small, result)`."""
