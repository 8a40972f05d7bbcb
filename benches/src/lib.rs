//! What Minerva's own code costs beside llama.cpp's ([`engine`]), what a GPU brings ([`gpu`]), our [`sampler`] beside its, and a load tool for any
//! OpenAI-compatible server (`serve`). benches/README.md says what each number means and how to compare it.

pub mod engine;
pub mod gpu;
pub mod sampler;
pub mod serve;

mod chart; // what all of them share
mod machine;
mod rows;
mod stats;
mod table;
