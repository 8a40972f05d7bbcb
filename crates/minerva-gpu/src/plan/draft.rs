//! A draft model beside the main one, or the model's own head: where it goes, what it takes, and that it is given up before anything of the
//! main model is.

use super::beside::{Guest, plan_beside, put_above};
use super::search::Search;
use super::{Plan, PlanError, Rung};
use crate::estimate::{Estimate, HostTraits, LoadSettings, ModelShape, Placement, estimate};
use crate::gguf::GgmlType;
use crate::memory::format_bytes;

/// The most tokens that a draft model computes at once: it catches up in small pieces.
const MOST_UBATCH_TOKENS: u32 = 512;

/// Where a draft model goes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum DraftPlace {
    /// Beside the main model: the device with most of its layers, or the host.
    #[default]
    Beside,
    /// The host.
    Host,
    /// A device of the machine, by its place there.
    Device(usize),
}

/// What the user fixed about a draft model.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DraftWishes {
    /// Where it goes.
    pub place: DraftPlace,
    /// Layers on the device, the output layer included; `None` is all.
    pub gpu_layers: Option<u32>,
    /// Cells; `None` is what one sequence of the main model has, or all where they share.
    pub n_cells: Option<u32>,
}

/// How a draft model is loaded.
#[derive(Debug, Clone, PartialEq)]
pub struct DraftLoad {
    /// Sizes and switches of its context.
    pub settings: LoadSettings,
    /// Its device among the plan's; `None` is the host.
    pub device: Option<usize>,
    /// Its layers on that device.
    pub placement: Placement,
    /// Bytes on that device, and on the host.
    pub estimate: Estimate,
    /// It is the main model's own head for multi-token prediction.
    pub is_head: bool,
}

impl DraftLoad {
    /// What it is called.
    pub(super) fn name(&self) -> &'static str {
        if self.is_head { "the head" } else { "the draft model" }
    }

    pub(super) fn guest(&self) -> Guest<'_> {
        Guest { device: self.device, estimate: &self.estimate, maps_weights: true }
    }
}

/// Adds a draft model to a plan, on top of its rungs.
pub(super) fn add(alone: Plan, search: Search<'_>, draft: &ModelShape, asked: DraftWishes) -> Result<Plan, PlanError> {
    let load = load(draft, asked, &search, alone.best())?;
    Ok(put_beside(alone, search, load))
}

/// Adds the model's own head; the search is one for the model that keeps hidden states for it.
pub(super) fn add_head(alone: Plan, search: Search<'_>, head: &ModelShape) -> Plan {
    let load = load_of_head(head, &search, alone.best());
    put_beside(alone, search, load)
}

fn put_beside(mut alone: Plan, mut search: Search<'_>, load: DraftLoad) -> Plan {
    if let Some(projector) = &alone.best().projector {
        search.reserve(projector.guest());
    }
    let head_layer = search.model.n_layers;
    let beside = plan_beside(search, load.guest(), alone.best());
    // A head is where its layer is.
    let stays = |beside: &Plan| !load.is_head || beside.best().placement.device_of(head_layer) == load.device;
    let Some(beside) = beside.filter(stays) else {
        let bytes = format_bytes(load.guest().total_bytes());
        let gave_up = format!("{}: its {bytes} have no room beside the main model", load.name());
        alone.rungs.iter_mut().for_each(|rung| rung.gave_up.push(gave_up.clone()));
        return alone;
    };
    let (projector, gave_up) = (alone.best().projector.clone(), alone.best().gave_up.clone());
    let best = beside.rungs.into_iter().next().unwrap_or_else(|| alone.best().clone());
    let best = Rung { draft: Some(load), projector, gave_up, ..best };
    for rung in &mut alone.rungs {
        rung.gave_up.push(best.draft.as_ref().map_or("", DraftLoad::name).to_owned());
    }
    alone.largest_context_tokens = beside.largest_context_tokens;
    put_above(best, alone)
}

/// A head is loaded with the model, and has sequences and cells as the model has.
pub(super) fn load_of_head(head: &ModelShape, search: &Search<'_>, main: &Rung) -> DraftLoad {
    let device = main.placement.device_of(search.model.n_layers);
    let placement = Placement::split(head, device.map(|_| head.n_layers_all + 1).as_slice());
    let traits: Vec<_> = device.iter().map(|&at| search.devices[at].kind.traits()).collect();
    let ubatch_tokens = main.settings.ubatch_tokens;
    let batch_tokens = main.settings.batch_tokens.min(ubatch_tokens).max(main.settings.n_sequences);
    let settings = LoadSettings { batch_tokens, ..main.settings.clone() };
    let estimate = estimate(head, &settings, &placement, &traits, &search.host.traits);
    DraftLoad { settings, device, placement, estimate, is_head: true }
}

fn load(draft: &ModelShape, asked: DraftWishes, search: &Search<'_>, main: &Rung) -> Result<DraftLoad, PlanError> {
    let device = match asked.place {
        DraftPlace::Host => None,
        DraftPlace::Beside => main.fullest_device(),
        DraftPlace::Device(given) => Some(search.position_of(given).ok_or_else(|| PlanError::Wish {
            setting: "device-draft",
            problem: format!("names device {given}, and the main model has {} to go to", search.devices.len()),
        })?),
    };
    // On a machine that turned out to be too small for any layer the draft model stays on the host too.
    let device = device.filter(|_| !main.is_cpu() || asked.place != DraftPlace::Beside);
    let all = draft.n_layers_all + 1;
    let counts = device.map(|_| asked.gpu_layers.map_or(all, |n| n.min(all)));
    let device = device.filter(|_| counts != Some(0));
    let placement = Placement::split(draft, counts.filter(|&n| n > 0).as_slice());
    let cells = if main.settings.kv_unified { main.settings.context_tokens } else { main.context_tokens };
    let ubatch_tokens = main.settings.ubatch_tokens.min(MOST_UBATCH_TOKENS);
    let settings = LoadSettings {
        context_tokens: asked.n_cells.unwrap_or(cells),
        n_sequences: main.settings.n_sequences,
        batch_tokens: ubatch_tokens.max(main.settings.n_sequences),
        ubatch_tokens,
        flash_attention: main.settings.flash_attention,
        cache_type_k: GgmlType::F16,
        cache_type_v: GgmlType::F16,
        kv_unified: true,
        full_windows: true,
    };
    let traits: Vec<_> = device.iter().map(|&at| search.devices[at].kind.traits()).collect();
    let host: &HostTraits = &search.host.traits;
    let estimate = estimate(draft, &settings, &placement, &traits, host);
    Ok(DraftLoad { settings, device, placement, estimate, is_head: false })
}
