//! A projector beside the main model: on the device with most of its layers, or on the host.

use super::beside::{Guest, plan_beside, put_above};
use super::search::Search;
use super::{Plan, PlanError, Rung};
use crate::estimate::{Estimate, ProjectorSettings, ProjectorShape, estimate_projector};
use crate::memory::format_bytes;

/// Where a projector goes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ProjectorPlace {
    /// Beside the main model: the device with most of its layers if there is room, or the host.
    #[default]
    Beside,
    /// The host (`--no-mmproj-offload`).
    Host,
}

/// What the user fixed about a projector.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ProjectorWishes {
    /// Where it goes.
    pub place: ProjectorPlace,
    /// The most tokens of one picture, for kinds that have no fixed size.
    pub image_max_tokens: Option<u32>,
}

/// How a projector is loaded: with room for the largest picture.
#[derive(Debug, Clone, PartialEq)]
pub struct ProjectorLoad {
    /// What its scratch was counted for.
    pub settings: ProjectorSettings,
    /// Its device among the plan's; `None` is the host.
    pub device: Option<usize>,
    /// Bytes on that device, and on the host.
    pub estimate: Estimate,
    /// Its scratch is an upper bound.
    pub is_bound: bool,
}

impl ProjectorLoad {
    /// mtmd copies a projector's weights, wherever they go.
    pub(super) fn guest(&self) -> Guest<'_> {
        Guest { device: self.device, estimate: &self.estimate, maps_weights: false }
    }
}

/// Adds a projector to a plan: to every rung, on a device at most in the first.
pub(super) fn add<'a>(
    alone: Plan,
    search: &dyn Fn() -> Result<Search<'a>, PlanError>,
    projector: &ProjectorShape,
    asked: ProjectorWishes,
) -> Result<Plan, PlanError> {
    let best = alone.best().clone();
    let on_device = best.fullest_device().filter(|_| asked.place == ProjectorPlace::Beside);
    let on_device = match on_device {
        Some(at) => {
            let search = search()?;
            let load = load(projector, asked, &best, Some((at, &search)));
            let beside = plan_beside(search, load.guest(), &best);
            Some((load, beside))
        }
        None => None,
    };
    let load = load(projector, asked, &best, None);
    let on_host = plan_beside(search()?, load.guest(), &best);
    let has_host = on_host.is_some();
    // The rungs are those of a machine that has less; what is said of the machine stays as it is.
    let mut below = Plan { rungs: on_host.map_or_else(|| alone.rungs.clone(), |plan| plan.rungs), ..alone };
    let said = match (&on_device, has_host) {
        (Some((_, Some(_))), true) => Some("the projector is on the host".to_owned()),
        (Some((_, Some(_))), false) => Some("the projector".to_owned()),
        (Some((load, None)), true) => Some(format!(
            "the projector is on the host: its {} have no room beside the main model",
            format_bytes(load.guest().on_device().total_bytes())
        )),
        (None, true) => None,
        (_, false) => {
            let bytes = format_bytes(load.guest().total_bytes());
            Some(format!("the projector: its {bytes} have no room on the host either"))
        }
    };
    for rung in &mut below.rungs {
        rung.projector = has_host.then(|| load.clone());
        rung.gave_up.extend(said.clone());
    }
    let Some((load, Some(beside))) = on_device else { return Ok(below) };
    let (largest_context_tokens, gave_up) = (beside.largest_context_tokens, best.gave_up.clone());
    let best = Rung { projector: Some(load), gave_up, ..beside.rungs.into_iter().next().unwrap_or(best) };
    Ok(Plan { largest_context_tokens, ..put_above(best, below) })
}

fn load(
    projector: &ProjectorShape,
    asked: ProjectorWishes,
    main: &Rung,
    device: Option<(usize, &Search<'_>)>,
) -> ProjectorLoad {
    let settings = ProjectorSettings {
        flash_attention: main.settings.flash_attention,
        image_max_tokens: asked.image_max_tokens,
        ..ProjectorSettings::default()
    };
    let traits = device.map(|(at, search)| search.devices[at].kind.traits());
    let estimate = estimate_projector(projector, traits, &settings);
    ProjectorLoad { settings, device: device.map(|(at, _)| at), estimate: estimate.bytes, is_bound: estimate.is_bound }
}
