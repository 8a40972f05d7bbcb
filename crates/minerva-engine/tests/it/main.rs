//! The engine through its public face: over the simulator, whose text depends on every token of a sequence, and over the
//! real model in [`real_model`]. `support` reads streams and checks on the way that they keep their order.

mod canary;
mod checkpoints;
mod constrained;
mod contract;
mod draft_model;
mod drafts;
mod dropping;
mod ending;
mod fairness;
mod faults;
mod head_model;
mod heads;
mod hints;
mod isolation;
mod output;
mod overload;
mod own_process;
mod random_schemas;
mod real_model;
mod refusals;
mod room;
mod support;
mod tiers;
mod traces;
