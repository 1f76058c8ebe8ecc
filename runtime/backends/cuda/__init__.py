"""CUDA without a package: driver, crop kernel, frames on the device."""
