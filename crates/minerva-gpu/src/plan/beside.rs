//! What is loaded beside a model and shares its devices: a projector, a draft model or the model's own head. None of these costs the main model anything.

use super::draft::{self, DraftWishes};
use super::machine::PlanMachine;
use super::projector::{self, ProjectorWishes};
use super::search::Search;
use super::{Plan, PlanError, Rung, Wishes, ladder, plan};
use crate::estimate::{DeviceLoad, Estimate, HeadShape, ModelShape, ProjectorShape};

/// What is to be loaded beside a model.
#[derive(Debug, Clone, Copy, Default)]
pub struct Companions<'a> {
    /// A draft model, and what the user fixed about it.
    pub draft: Option<(&'a ModelShape, DraftWishes)>,
    /// The model's own head, if no draft model is to be loaded.
    pub head: Option<&'a HeadShape>,
    /// A projector of images or sound, and what the user fixed about it.
    pub projector: Option<(&'a ProjectorShape, ProjectorWishes)>,
}

/// Plans a load with companions, as long as the main model gives up nothing for them: no layer, no sequence, no context. A projector
/// that finds no room on a device goes onto the host; a draft model gets what the projector leaves, or is left out.
///
/// # Errors
/// As [`plan`](super::plan()); [`PlanError::Wish`] also for a device that is not there.
pub fn plan_with(
    model: &ModelShape,
    wishes: &Wishes,
    machine: &PlanMachine,
    companions: &Companions<'_>,
) -> Result<Plan, PlanError> {
    let mut planned = plan(model, wishes, machine)?;
    let machine = &*machine.of_rung(planned.best());
    if let Some((shape, asked)) = companions.projector {
        planned = projector::add(planned, &|| Search::new(model, wishes, machine), shape, asked)?;
    }
    if let Some((shape, asked)) = companions.draft {
        planned = draft::add(planned, Search::new(model, wishes, machine)?, shape, asked)?;
    } else if let Some(HeadShape { model, head }) = companions.head {
        planned = draft::add_head(planned, Search::new(model, wishes, machine)?, head);
    }
    Ok(planned)
}

/// One companion, as far as room is concerned.
#[derive(Debug, Clone, Copy)]
pub(super) struct Guest<'a> {
    /// Its device among the search's.
    pub(super) device: Option<usize>,
    /// Bytes on that device, and on the host.
    pub(super) estimate: &'a Estimate,
    /// Its weights on the host are read from the file where the main model's are.
    pub(super) maps_weights: bool,
}

impl Guest<'_> {
    /// Bytes on its device.
    pub(super) fn on_device(&self) -> DeviceLoad {
        self.estimate.devices.first().copied().unwrap_or_default()
    }

    /// Bytes everywhere.
    pub(super) fn total_bytes(&self) -> u64 {
        self.on_device().total_bytes().saturating_add(self.estimate.host.total_bytes())
    }
}

/// The plan with a guest, if it has room and the main model then has as much as in `alone`. The search knows of other guests.
pub(super) fn plan_beside(mut search: Search<'_>, guest: Guest<'_>, alone: &Rung) -> Option<Plan> {
    let fits = search.has_room_for(guest);
    search.reserve(guest);
    let beside = if fits { search.plan().ok() } else { None };
    beside.filter(|beside| gives_up_nothing(beside.best(), alone))
}

/// Puts `best` on top of the rungs of `below`. A smaller load of the main model that is larger without the guest would be no step down.
pub(super) fn put_above(best: Rung, mut below: Plan) -> Plan {
    below.rungs.retain(|rung| rung.is_cpu() || ladder::takes_less(rung, &best));
    below.rungs.insert(0, best);
    below
}

/// As many layers, experts, sequences and cells as without.
fn gives_up_nothing(with: &Rung, without: &Rung) -> bool {
    let kept = |rung: &Rung| {
        let (placement, settings) = (&rung.placement, &rung.settings);
        let experts = placement.expert_layers_on_host().len();
        (placement.n_gpu_layers(), experts, settings.n_sequences, settings.context_tokens, rung.context_tokens)
    };
    kept(with) == kept(without)
        && with.as_stored == without.as_stored
        && with.settings.kv_unified == without.settings.kv_unified
}
