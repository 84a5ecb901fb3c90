//! Fuzz targets, one for each file format: what each runs, and how files are changed.

pub mod mutate;
pub mod targets;
