//! The rungs below a load: what to try next when it fails although it should have fitted.

use super::Rung;
use super::search::{Draft, MIN_UBATCH_TOKENS, Search, step_down};

/// Shares of the layers on devices that the rungs keep, in quarters.
const QUARTERS: [u32; 3] = [3, 2, 1];

/// Smaller and smaller loads, each with less on every device: fewer experts, fewer layers, then also a smaller micro-batch,
/// cache type, and context where they are open. The CPU is not among them.
pub(super) fn below(search: &Search<'_>, best: &Rung) -> Vec<Rung> {
    if best.is_cpu() {
        return Vec::new();
    }
    let mut rungs: Vec<Rung> = Vec::new();
    let draft = Draft {
        settings: best.settings.clone(),
        context_tokens: best.context_tokens,
        gave_up: best.gave_up.clone(),
        value: 1.0,
    };
    let add = |rungs: &mut Vec<Rung>, draft: &Draft, n_layers: u32, n_experts_left: u32| {
        let Some(placement) = search.place_layers(draft, n_layers, n_experts_left) else { return };
        let mut rung = search.rung(draft, placement);
        rung.gave_up.dedup();
        let above = rungs.last().unwrap_or(best);
        if takes_less(&rung, above) {
            rungs.push(rung);
        }
    };
    let n_layers = best.placement.n_gpu_layers();
    let n_left = u32::try_from(best.placement.expert_layers_on_host().len()).unwrap_or(u32::MAX);
    let n_model_layers = search.model.n_layers;
    let mut n_experts_left = n_left;
    let is_open = search.wishes.expert_layers_on_host.is_none();
    if search.model.n_experts > 0 && is_open && n_left < n_model_layers {
        for quarter in QUARTERS {
            n_experts_left = n_model_layers - (n_model_layers - n_left) * (quarter - 1) / QUARTERS.len() as u32;
            add(&mut rungs, &draft, n_layers, n_experts_left);
        }
    }
    for quarter in QUARTERS {
        add(&mut rungs, &draft, (n_layers * quarter / 4).max(1), n_experts_left);
    }
    // Then the smallest of them with less of everything else that is open: scratch and cache type first, and a quarter of the
    // cells. Less than that is no better than the CPU with all of them.
    let quarter = (n_layers / 4).max(1);
    let n_cells = draft.settings.context_tokens;
    let mut smaller = draft;
    while let Some(gave_up) = step_down(&mut smaller, search.wishes, search.model.has_windows()) {
        if smaller.settings.context_tokens < n_cells / 4 {
            break;
        }
        smaller.gave_up.push(gave_up);
        let has_least_scratch =
            smaller.settings.ubatch_tokens <= MIN_UBATCH_TOKENS || search.wishes.ubatch_tokens.is_some();
        if has_least_scratch && smaller.settings.context_tokens == n_cells {
            add(&mut rungs, &smaller, quarter, n_experts_left);
        }
        if smaller.settings.context_tokens == n_cells / 4 {
            add(&mut rungs, &smaller, quarter, n_experts_left);
        }
    }
    rungs
}

/// Less in sum, and nowhere more.
pub(super) fn takes_less(rung: &Rung, above: &Rung) -> bool {
    let bytes =
        |rung: &Rung| -> Vec<u64> { (0..rung.estimate.devices.len()).map(|at| rung.device_bytes(at)).collect() };
    let (below, above) = (bytes(rung), bytes(above));
    below.iter().zip(&above).all(|(below, above)| below <= above) && below.iter().sum::<u64>() < above.iter().sum()
}
