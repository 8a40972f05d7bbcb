//! What goes where: a plan for a model on devices of known size, and the smaller plans below it.
//!
//! [`plan`] takes a [`ModelShape`], what the user fixed ([`Wishes`]) and a [`Machine`](PlanMachine), and answers a [`Plan`]:
//! the best load that fits, and the rungs to step down to when the world turns out smaller than it looked. Nothing is loaded
//! and no device is touched, so a plan can be made for machines that do not exist.
//!
//! # Invariants
//! - What the user fixed is never changed; what was given up is said, with the reason, in [`Rung::gave_up`].
//! - A plan holds on every device: weights, cache, scratch and the backend's own overhead are within its budget.
//! - The order in which devices are named changes nothing but the order in which they are reported.
//! - Each rung takes less of every device than the one above it.

mod beside;
mod draft;
mod ladder;
mod machine;
mod projector;
mod search;
mod speed;
mod split;
mod table;
#[cfg(test)]
mod tests;

pub use beside::{Companions, plan_with};
pub use draft::{DraftLoad, DraftPlace, DraftWishes};
pub use machine::{ParseMachineError, PlanDevice, PlanDeviceKind, PlanHost, PlanMachine, of_nominal_bandwidth};
pub use projector::{ProjectorLoad, ProjectorPlace, ProjectorWishes};
pub use speed::Speed;

use crate::estimate::{DeviceLoad, Estimate, HeadShape, LoadSettings, ModelShape, Placement};
use crate::gguf::GgmlType;
use crate::memory::format_bytes;
use beside::Guest;

/// Sequences to aim for when the user does not say.
pub const DEFAULT_N_SEQUENCES: u32 = 8;
/// The context per sequence to aim for when the user does not say: what the model was trained for, up to this.
pub const DEFAULT_CONTEXT_TOKENS: u32 = 8192;
/// The smallest context that an open wish is shrunk to.
pub const MIN_CONTEXT_TOKENS: u32 = 512;

/// What the user fixed. Whatever is `None` is the planner's to choose.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wishes {
    /// Layers on devices, the output layer included; never more than there are.
    pub gpu_layers: Option<u32>,
    /// Layers whose experts stay on the host, the first ones of the model.
    pub expert_layers_on_host: Option<u32>,
    /// The most tokens of one sequence.
    pub context_tokens: Option<u32>,
    /// Cells of all sequences together.
    pub n_cells: Option<u32>,
    /// Sequences.
    pub n_sequences: Option<u32>,
    /// The most tokens of one batch.
    pub batch_tokens: u32,
    /// The most tokens that a device computes at once.
    pub ubatch_tokens: Option<u32>,
    /// Flash attention; `None` is on, as llama.cpp chooses where the device has it.
    pub flash_attention: Option<bool>,
    /// Element type of the K cache; `None` is f16.
    pub cache_type_k: Option<GgmlType>,
    /// Element type of the V cache; `None` is f16.
    pub cache_type_v: Option<GgmlType>,
    /// A cache that was left open may become q8_0 when room is short. Off by default: it changes the answers a little.
    pub may_quantise_cache: bool,
    /// One pool of cells for all sequences.
    pub kv_unified: bool,
    /// Windowed layers keep the whole context; `None` is where there is room.
    pub full_windows: Option<bool>,
    /// A plan without any device may be the answer.
    pub cpu_fallback: bool,
}

impl Default for Wishes {
    fn default() -> Self {
        Self {
            gpu_layers: None,
            expert_layers_on_host: None,
            context_tokens: None,
            n_cells: None,
            n_sequences: None,
            batch_tokens: 2048,
            ubatch_tokens: None,
            flash_attention: None,
            cache_type_k: None,
            cache_type_v: None,
            may_quantise_cache: false,
            kv_unified: false,
            full_windows: None,
            cpu_fallback: true,
        }
    }
}

/// One way to load the model.
#[derive(Debug, Clone, PartialEq)]
pub struct Rung {
    /// Sizes and switches of the context.
    pub settings: LoadSettings,
    /// The most tokens of one sequence.
    pub context_tokens: u32,
    /// Layers on the plan's devices.
    pub placement: Placement,
    /// Bytes on each of the plan's devices, and on the host.
    pub estimate: Estimate,
    /// How fast it should be.
    pub speed: Speed,
    /// The draft model beside it or its own head, if one writes ahead.
    pub draft: Option<DraftLoad>,
    /// The projector beside it, if there is one.
    pub projector: Option<ProjectorLoad>,
    /// What this rung has less of than was wished for, with the reason.
    pub gave_up: Vec<String>,
    /// Weights on the host stay as the file has them, though the host's matrix code would repack them: there is no room for copies.
    pub as_stored: bool,
}

impl Rung {
    /// Bytes on one of the plan's devices, those of a draft model and a projector included.
    pub fn device_bytes(&self, at: usize) -> u64 {
        let own = self.estimate.devices.get(at).map_or(0, DeviceLoad::total_bytes);
        let beside =
            self.guests().filter(|guest| guest.device == Some(at)).map(|guest| guest.on_device().total_bytes());
        beside.fold(own, u64::saturating_add)
    }

    /// Bytes on the host, those of a draft model and a projector included.
    pub fn host_bytes(&self) -> u64 {
        let beside = self.guests().map(|guest| guest.estimate.host.total_bytes());
        beside.fold(self.estimate.host.total_bytes(), u64::saturating_add)
    }

    fn guests(&self) -> impl Iterator<Item = Guest<'_>> {
        let projector = self.projector.iter().map(ProjectorLoad::guest);
        self.draft.iter().map(DraftLoad::guest).chain(projector)
    }

    /// The device with most of the layers; the first of several. `None` without layers on any.
    fn fullest_device(&self) -> Option<usize> {
        let layers = self.placement.layers_per_device();
        (0..layers.len()).rev().max_by_key(|&at| layers[at]).filter(|&at| layers[at] > 0)
    }

    /// No layer on any device.
    pub fn is_cpu(&self) -> bool {
        self.placement.n_gpu_layers() == 0
    }
}

/// The best load that fits, and what comes below it.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// Devices in the order in which llama.cpp gets them: it does not depend on the order in which they were given.
    pub devices: Vec<PlanDevice>,
    /// Where each of them was in the machine that was given.
    pub given_positions: Vec<usize>,
    /// The host.
    pub host: PlanHost,
    /// The best first. Never empty.
    pub rungs: Vec<Rung>,
    /// The largest context of one sequence that fits with everything else as in the best rung.
    pub largest_context_tokens: u32,
}

impl Plan {
    /// The best load.
    pub fn best(&self) -> &Rung {
        &self.rungs[0]
    }
}

/// Why there is no plan.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// Not even the smallest plan that the wishes allow fits. The guide's words.
    #[error(
        "Out of memory: {what} memory exceeded: {} + {} > {}",
        format_bytes(*used_bytes),
        format_bytes(*needed_bytes),
        format_bytes(*limit_bytes)
    )]
    OutOfMemory {
        /// `GPU` or `system`.
        what: &'static str,
        /// In use already.
        used_bytes: u64,
        /// What the smallest plan takes.
        needed_bytes: u64,
        /// What may be used.
        limit_bytes: u64,
    },
    /// Wishes that contradict each other.
    #[error("{setting}: {problem}")]
    Wish {
        /// The setting.
        setting: &'static str,
        /// What is wrong with it.
        problem: String,
    },
}

/// Plans a load.
///
/// # Errors
/// [`PlanError::OutOfMemory`] when nothing that the wishes allow fits, [`PlanError::Wish`] when they contradict each other.
pub fn plan(model: &ModelShape, wishes: &Wishes, machine: &PlanMachine) -> Result<Plan, PlanError> {
    search::Search::new(model, wishes, machine)?.plan()
}

/// A rung of such a plan with other settings of the same load: as many cells and sequences, the same placement. `None` where that does
/// not fit, or takes more of the host than Minerva takes by itself while the rung does not.
///
/// The wishes, the machine and the head are those that the rung was planned for; whether the settings are what the user wants is the
/// caller's to know.
pub fn with_settings(
    model: &ModelShape,
    wishes: &Wishes,
    machine: &PlanMachine,
    rung: &Rung,
    settings: &LoadSettings,
    head: Option<&HeadShape>,
) -> Option<Rung> {
    let machine = &machine.of_rung(rung);
    let Some(head) = head.filter(|_| rung.draft.as_ref().is_some_and(|load| load.is_head)) else {
        return search::Search::new(model, wishes, machine).ok()?.with_settings(rung, settings);
    };
    let search = search::Search::new(&head.model, wishes, machine).ok()?;
    let other = Rung { settings: settings.clone(), ..rung.clone() };
    let draft = Some(draft::load_of_head(&head.head, &search, &other));
    search.with_settings(&Rung { draft, ..rung.clone() }, settings)
}
