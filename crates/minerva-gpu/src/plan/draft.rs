//! A draft model beside the main one: where it goes, what it takes, and that it is given up before anything of the main model is.

use super::machine::PlanMachine;
use super::search::Search;
use super::{Plan, PlanError, Rung, Wishes, ladder, plan};
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
}

/// Plans a load with a draft model, as long as the main model gives up nothing for it: no layer, no sequence, no context. Otherwise, and
/// on the rungs below, there is none.
///
/// # Errors
/// As [`plan`](super::plan()); [`PlanError::Wish`] also for a device that is not there.
pub fn plan_with_draft(
    model: &ModelShape,
    wishes: &Wishes,
    machine: &PlanMachine,
    draft: &ModelShape,
    asked: &DraftWishes,
) -> Result<Plan, PlanError> {
    let mut alone = plan(model, wishes, machine)?;
    let mut search = Search::new(model, wishes, machine)?;
    let load = load(draft, asked, &search, alone.best())?;
    let fits = search.has_room_for(&load);
    search.reserve(&load);
    let bytes = load.estimate.host.total_bytes()
        + load.estimate.devices.first().map_or(0, crate::estimate::DeviceLoad::total_bytes);
    let beside = if fits { search.plan().ok() } else { None };
    let Some(beside) = beside.filter(|beside| gives_up_nothing(beside.best(), alone.best())) else {
        let gave_up = format!("the draft model: its {} have no room beside the main model", format_bytes(bytes));
        alone.rungs.iter_mut().for_each(|rung| rung.gave_up.push(gave_up.clone()));
        return Ok(alone);
    };
    let best = Rung { draft: Some(load), ..beside.rungs.into_iter().next().unwrap_or_else(|| alone.best().clone()) };
    for rung in &mut alone.rungs {
        rung.gave_up.push("the draft model".to_owned());
    }
    // A smaller draft of the main model that is larger without it would be no step down.
    alone.rungs.retain(|rung| rung.is_cpu() || ladder::takes_less(rung, &best));
    alone.rungs.insert(0, best);
    alone.largest_context_tokens = beside.largest_context_tokens;
    Ok(alone)
}

/// As many layers, experts, sequences and cells as without.
fn gives_up_nothing(with: &Rung, without: &Rung) -> bool {
    let kept = |rung: &Rung| {
        let (placement, settings) = (&rung.placement, &rung.settings);
        let experts = placement.expert_layers_on_host().len();
        (placement.n_gpu_layers(), experts, settings.n_sequences, settings.context_tokens, rung.context_tokens)
    };
    kept(with) == kept(without) && with.settings.kv_unified == without.settings.kv_unified
}

fn load(draft: &ModelShape, asked: &DraftWishes, search: &Search<'_>, main: &Rung) -> Result<DraftLoad, PlanError> {
    let layers = main.placement.layers_per_device();
    let fullest = || (0..layers.len()).rev().max_by_key(|&at| layers[at]).filter(|&at| layers[at] > 0);
    let device = match asked.place {
        DraftPlace::Host => None,
        DraftPlace::Beside => fullest(),
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
        batch_tokens: ubatch_tokens,
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
    Ok(DraftLoad { settings, device, placement, estimate })
}
