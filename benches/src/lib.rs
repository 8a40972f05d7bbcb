//! What Minerva's own code costs beside llama.cpp's ([`engine`]), and a load tool for any OpenAI-compatible server
//! (`serve`). benches/README.md says what each number means and how to compare it.

pub mod engine;
pub mod serve;
