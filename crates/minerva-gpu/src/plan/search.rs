//! The search for the best load that fits.
//!
//! First the wish itself, with as many layers on devices as fit (experts stay behind before whole layers do); then smaller
//! wishes that bring every layer onto devices. Of all these the best score wins: predicted speed, discounted for what was given
//! up. A thing given up must buy speed: half the sequences, or half the context, at least 1.4 times.

use std::cell::{Cell, RefCell};

use super::beside::Guest;
use super::ladder;
use super::machine::{PlanDevice, PlanHost, PlanMachine};
use super::speed;
use super::split::share_out;
use super::{DEFAULT_CONTEXT_TOKENS, DEFAULT_N_SEQUENCES, MIN_CONTEXT_TOKENS, Plan, PlanError, Rung, Wishes};
use crate::estimate::{
    DeviceTraits, Estimate, HostTraits, LoadSettings, ModelShape, Placement, estimate, estimate_held, layer_bytes,
};
use crate::gguf::GgmlType;
use crate::memory::format_bytes;

/// The micro-batch to aim for when the user does not say.
const DEFAULT_UBATCH_TOKENS: u32 = 512;
/// The smallest micro-batch that an open wish is shrunk to.
pub(super) const MIN_UBATCH_TOKENS: u32 = 128;

/// How much faster whole layers must look before the experts leave with them: the attention that would leave too grows with the
/// context.
const WHOLE_LAYERS_GAIN: f64 = 1.1;

/// A set of wishes made concrete, and what was given up for it.
#[derive(Debug, Clone)]
pub(super) struct Draft {
    pub(super) settings: LoadSettings,
    pub(super) context_tokens: u32,
    pub(super) gave_up: Vec<String>,
    /// What the user has of his wish, as a factor on speed.
    pub(super) value: f64,
}

pub(super) struct Search<'a> {
    pub(super) model: &'a ModelShape,
    pub(super) wishes: &'a Wishes,
    pub(super) devices: Vec<PlanDevice>,
    given_positions: Vec<usize>,
    pub(super) host: PlanHost,
    /// Whether the host would repack weights, and is not to.
    as_stored: bool,
    /// The least that did not fit, for the error.
    closest: Cell<Option<u64>>,
    /// The last load that was estimated in full: a rung is made of what was just found to fit.
    last: RefCell<Option<(LoadSettings, Placement, Estimate)>>,
}

impl<'a> Search<'a> {
    pub(super) fn new(model: &'a ModelShape, wishes: &'a Wishes, machine: &PlanMachine) -> Result<Self, PlanError> {
        check(wishes)?;
        let mut order: Vec<usize> = (0..machine.devices.len()).collect();
        // By what they are, never by where they were named; equal devices cannot be told apart. A bandwidth that was measured is
        // never the same twice.
        order.sort_by_key(|&position| {
            let device = &machine.devices[position];
            let magnitude = device.bandwidth.max(1).ilog2();
            (std::cmp::Reverse((magnitude, device.budget_bytes())), device.kind, device.name.clone())
        });
        let devices = order.iter().map(|&position| machine.devices[position].clone()).collect();
        let host = machine.host.clone();
        Ok(Self {
            model,
            wishes,
            devices,
            given_positions: order,
            host,
            as_stored: false,
            closest: Cell::new(None),
            last: RefCell::new(None),
        })
    }

    /// The same with weights as the file has them, which the system can drop and read again. `None` where nothing is repacked anyway, or
    /// the file is not mapped.
    pub(super) fn as_stored(&self) -> Option<Self> {
        if !self.host.maps_weights || self.host.traits == HostTraits::default() {
            return None;
        }
        Some(Self {
            devices: self.devices.clone(),
            given_positions: self.given_positions.clone(),
            host: PlanHost { traits: HostTraits::default(), ..self.host.clone() },
            as_stored: true,
            closest: Cell::new(None),
            last: RefCell::new(None),
            ..*self
        })
    }

    /// Takes what a companion needs off the room.
    pub(super) fn reserve(&mut self, guest: Guest<'_>) {
        let on_device = guest.on_device().total_bytes();
        if let Some(device) = guest.device.and_then(|at| self.devices.get_mut(at)) {
            device.free_bytes = device.free_bytes.saturating_sub(on_device);
            device.taken_bytes = device.taken_bytes.saturating_add(on_device);
        }
        self.host.free_bytes = self.host.free_bytes.saturating_sub(self.allocated_by(guest));
        self.host.taken_bytes = self.host.taken_bytes.saturating_add(guest.estimate.host.total_bytes());
    }

    /// Whether a companion has the room that it is to get.
    pub(super) fn has_room_for(&self, guest: Guest<'_>) -> bool {
        let room = guest.device.and_then(|at| self.devices.get(at)).map_or(0, PlanDevice::budget_bytes);
        guest.on_device().total_bytes() <= room && self.allocated_by(guest) <= self.host.free_bytes
    }

    /// What a companion has to allocate on the host.
    fn allocated_by(&self, guest: Guest<'_>) -> u64 {
        if guest.maps_weights { self.host_bytes(guest.estimate) } else { guest.estimate.host.total_bytes() }
    }

    /// Where a device of the machine that was given stands among the devices here.
    pub(super) fn position_of(&self, given: usize) -> Option<usize> {
        self.given_positions.iter().position(|&position| position == given)
    }

    pub(super) fn plan(self) -> Result<Plan, PlanError> {
        let wish = self.first_draft()?;
        let wants_devices = !self.devices.is_empty() && self.wishes.gpu_layers != Some(0);
        let best = if wants_devices { self.best_on_devices(&wish) } else { None };
        // Copies of what stays on the host may be all that has no room.
        if best.is_none() && wants_devices {
            let as_stored = self.as_stored().and_then(|search| search.plan().ok());
            if let Some(plan) = as_stored.filter(|plan| !plan.best().is_cpu()) {
                return Ok(plan);
            }
        }
        let needed = self.closest.get();
        let cpu = || self.on_cpu(&wish, wants_devices);
        let best = match best {
            Some(best) => best,
            None if wants_devices && !self.wishes.cpu_fallback => return Err(self.out_of_memory(needed.unwrap_or(0))),
            None => cpu()?,
        };
        let as_stored = if best.as_stored { self.as_stored() } else { None };
        let largest_context_tokens = as_stored.as_ref().unwrap_or(&self).largest_context(&best);
        let mut rungs = ladder::below(&self, &best);
        if !best.is_cpu() && self.wishes.cpu_fallback {
            rungs.extend(cpu().ok());
        }
        rungs.insert(0, best);
        let Self { devices, given_positions, host, .. } = self;
        Ok(Plan { devices, given_positions, host, rungs, largest_context_tokens })
    }

    /// The wish as it is.
    pub(super) fn first_draft(&self) -> Result<Draft, PlanError> {
        let (wishes, trained) = (self.wishes, self.model.context_train_tokens);
        let context = wishes.context_tokens.unwrap_or_else(|| trained.clamp(1, DEFAULT_CONTEXT_TOKENS));
        let (n_sequences, n_cells, kv_unified, context_tokens) = match wishes.n_cells {
            None => {
                let n_sequences = wishes.n_sequences.unwrap_or(DEFAULT_N_SEQUENCES);
                let n_cells = context.checked_mul(n_sequences).ok_or_else(|| PlanError::Wish {
                    setting: "ctx",
                    problem: format!(
                        "times `parallel` is more cells than a 32-bit count holds: {context} x {n_sequences}"
                    ),
                })?;
                (n_sequences, n_cells, wishes.kv_unified, context)
            }
            Some(n_cells) => {
                if wishes.context_tokens.is_some_and(|context| context > n_cells) {
                    let problem =
                        format!("is {context} tokens, but all sequences share {n_cells} cells (`--ctx-size`)");
                    return Err(PlanError::Wish { setting: "ctx", problem });
                }
                let n_sequences =
                    wishes.n_sequences.unwrap_or_else(|| (n_cells / context).clamp(1, DEFAULT_N_SEQUENCES));
                // Requests that may be longer than an equal share of the cells need one pool.
                let unified = wishes.kv_unified
                    || (wishes.context_tokens.is_some() && context.saturating_mul(n_sequences) > n_cells);
                let own = wishes.context_tokens.unwrap_or(n_cells / n_sequences);
                (n_sequences, n_cells, unified, if unified { context.min(n_cells) } else { own })
            }
        };
        let settings = LoadSettings {
            context_tokens: n_cells,
            n_sequences,
            batch_tokens: wishes.batch_tokens.max(n_sequences), // every sequence may have an output in a step
            ubatch_tokens: wishes.ubatch_tokens.unwrap_or(DEFAULT_UBATCH_TOKENS).min(wishes.batch_tokens),
            flash_attention: wishes.flash_attention.unwrap_or(true),
            cache_type_k: wishes.cache_type_k.unwrap_or(GgmlType::F16),
            cache_type_v: wishes.cache_type_v.unwrap_or(GgmlType::F16),
            kv_unified,
            full_windows: wishes.full_windows.unwrap_or(true),
        };
        Ok(Draft { settings, context_tokens, gave_up: Vec::new(), value: 1.0 })
    }

    fn best_on_devices(&self, wish: &Draft) -> Option<Rung> {
        if self.wishes.gpu_layers.is_some() && !self.wishes.cpu_fallback {
            // Layers that were asked for and no way back: that many or none.
            let smaller = || self.smaller_drafts(wish).find_map(|draft| self.place_everything(&draft));
            return self.place_everything(wish).or_else(smaller);
        }
        let partial = self.place(wish);
        if let Some(rung) = partial.as_ref().filter(|rung| self.is_everything(rung)) {
            return Some(rung.clone());
        }
        // The first smaller wish that brings everything onto devices, and the one before it with what fits.
        let mut best = partial.map(|rung| (rung.speed.decode_tokens_per_second * wish.value, rung));
        for draft in self.smaller_drafts(wish) {
            if let Some(rung) = self.place_everything(&draft) {
                let score = rung.speed.decode_tokens_per_second * draft.value;
                if best.as_ref().is_none_or(|(other, _)| score > *other) {
                    best = Some((score, rung));
                }
                break;
            }
        }
        if best.is_none() {
            best = self.smaller_drafts(wish).find_map(|draft| self.place(&draft)).map(|rung| (0.0, rung));
        }
        best.map(|(_, rung)| rung)
    }

    /// Smaller wishes, each a step below the one before it: windows, micro-batch, cache type, sequences, context.
    pub(super) fn smaller_drafts(&self, from: &Draft) -> impl Iterator<Item = Draft> {
        let (wishes, has_windows) = (self.wishes, self.model.has_windows());
        let mut draft = from.clone();
        std::iter::from_fn(move || {
            let next = step_down(&mut draft, wishes, has_windows)?;
            draft.gave_up.push(next);
            Some(draft.clone())
        })
    }

    fn is_everything(&self, rung: &Rung) -> bool {
        let n_experts_left = rung.placement.expert_layers_on_host().len();
        rung.placement.n_gpu_layers() == self.wanted_layers() && n_experts_left <= self.wanted_on_host() as usize
    }

    fn wanted_layers(&self) -> u32 {
        let all = self.model.n_layers_all + 1;
        self.wishes.gpu_layers.map_or(all, |n| n.min(all))
    }

    /// Experts that stay on the host because the user says so.
    fn wanted_on_host(&self) -> u32 {
        let n_layers = if self.model.n_experts > 0 { self.model.n_layers } else { 0 };
        self.wishes.expert_layers_on_host.unwrap_or(0).min(n_layers)
    }

    fn place_everything(&self, draft: &Draft) -> Option<Rung> {
        let placement = self.place_layers(draft, self.wanted_layers(), self.wanted_on_host())?;
        Some(self.rung(draft, placement))
    }

    /// As much on devices as fits: everything, or with experts left behind, or fewer layers where that is clearly faster.
    pub(super) fn place(&self, draft: &Draft) -> Option<Rung> {
        if let Some(rung) = self.place_everything(draft) {
            return Some(rung);
        }
        if self.model.n_experts == 0 || self.wishes.expert_layers_on_host.is_some() {
            return self.place_fewer_layers(draft, self.wanted_on_host());
        }
        let (wanted, n_layers) = (self.wanted_layers(), self.model.n_layers);
        let all_layers = first_that_fits(1, n_layers, |n_left| self.place_layers(draft, wanted, n_left));
        let all_layers = all_layers.map(|placement| self.rung(draft, placement));
        if all_layers.is_some() && self.wishes.gpu_layers.is_some() {
            return all_layers; // layers that the user fixed are not given up for speed
        }
        let experts_left = all_layers.or_else(|| self.place_fewer_layers(draft, n_layers));
        let whole_layers = self.place_fewer_layers(draft, 0);
        let speed = |rung: &Option<Rung>| rung.as_ref().map_or(0.0, |rung| rung.speed.decode_tokens_per_second);
        if speed(&whole_layers) > WHOLE_LAYERS_GAIN * speed(&experts_left) { whole_layers } else { experts_left }
    }

    /// Fewer layers than wanted, as many as fit, with the experts of so many left behind.
    pub(super) fn place_fewer_layers(&self, draft: &Draft, n_experts_left: u32) -> Option<Rung> {
        let wanted = self.wanted_layers();
        let fits = |n_fewer: u32| self.place_layers(draft, wanted - n_fewer, n_experts_left);
        Some(self.rung(draft, first_that_fits(1, wanted.saturating_sub(1), fits)?))
    }

    /// The last `n_layers` on devices, the experts of the first `n_experts_left` layers on the host.
    pub(super) fn place_layers(&self, draft: &Draft, n_layers: u32, n_experts_left: u32) -> Option<Placement> {
        let mut sizes = layer_bytes(self.model, &draft.settings);
        for (size, experts) in sizes.iter_mut().zip(self.model.expert_bytes()).take(n_experts_left as usize) {
            *size = size.saturating_sub(experts);
        }
        let first = sizes.len().checked_sub(n_layers as usize)?;
        let room: Vec<u64> = self.devices.iter().map(PlanDevice::budget_bytes).collect();
        let place = |counts: &[u32]| Placement::split(self.model, counts).with_experts_on_host(0..n_experts_left);
        share_out(&sizes[first..], &room, place, |placement| self.excess(draft, placement))
    }

    /// By how many bytes each device is too full; scratch is only simulated where the rest fits.
    fn excess(&self, draft: &Draft, placement: &Placement) -> Vec<u64> {
        let traits = self.traits();
        let held = estimate_held(self.model, &draft.settings, placement, &traits, &self.host.traits);
        let over = self.over(&held);
        if over.iter().any(|&bytes| bytes > 0) {
            return over;
        }
        self.over(&self.estimate(&draft.settings, placement))
    }

    fn estimate(&self, settings: &LoadSettings, placement: &Placement) -> Estimate {
        let mut last = self.last.borrow_mut();
        if let Some((_, _, estimate)) = last.as_ref().filter(|(s, p, _)| s == settings && p == placement) {
            return estimate.clone();
        }
        let fresh = estimate(self.model, settings, placement, &self.traits(), &self.host.traits);
        *last = Some((settings.clone(), placement.clone(), fresh.clone()));
        fresh
    }

    fn over(&self, estimate: &Estimate) -> Vec<u64> {
        let host_over = self.host_excess(estimate);
        let on_devices: u64 = estimate.devices.iter().map(crate::estimate::DeviceLoad::total_bytes).sum();
        let excess = estimate.devices.iter().zip(&self.devices).map(|(load, device)| {
            let shared = if device.unified { self.host_bytes(estimate) } else { 0 };
            (load.total_bytes().saturating_add(shared)).saturating_sub(device.budget_bytes()).max(host_over)
        });
        let excess: Vec<u64> = excess.collect();
        if excess.iter().any(|&bytes| bytes > 0) {
            self.closest.set(Some(self.closest.get().map_or(on_devices, |bytes| bytes.min(on_devices))));
        }
        excess
    }

    /// What has to be allocated on the host.
    fn host_bytes(&self, estimate: &Estimate) -> u64 {
        estimate.host_allocated_bytes(self.host.maps_weights)
    }

    fn host_excess(&self, estimate: &Estimate) -> u64 {
        self.host_bytes(estimate).saturating_sub(self.host.free_bytes)
    }

    fn traits(&self) -> Vec<DeviceTraits> {
        self.devices.iter().map(|device| device.kind.traits()).collect()
    }

    pub(super) fn rung(&self, draft: &Draft, placement: Placement) -> Rung {
        let estimate = self.estimate(&draft.settings, &placement);
        let speed = speed::predict(self.model, &draft.settings, &placement, &self.devices, &self.host);
        let mut gave_up = draft.gave_up.clone();
        let (n_layers, wanted) = (placement.n_gpu_layers(), self.wanted_layers());
        let n_experts_left = placement.expert_layers_on_host().len();
        let room = format_bytes(self.devices.iter().map(PlanDevice::budget_bytes).sum());
        if n_layers < wanted && n_layers > 0 {
            gave_up.push(format!("{n_layers} of {wanted} layers on devices: {room} is their room"));
        }
        if n_experts_left > self.wanted_on_host() as usize && n_layers > 0 {
            gave_up
                .push(format!("the experts of {n_experts_left} layers stay on the host: {room} is the devices' room"));
        }
        let as_stored = self.as_stored;
        if as_stored {
            gave_up.push("weights in this CPU's own layout: they would have to fit in memory".to_owned());
        }
        let settings = draft.settings.clone();
        let context_tokens = draft.context_tokens;
        Rung { settings, context_tokens, placement, estimate, speed, draft: None, projector: None, gave_up, as_stored }
    }

    /// The last rung: no device. What was left open shrinks to the host's share, and no further than its smallest.
    fn on_cpu(&self, wish: &Draft, is_fallback: bool) -> Result<Rung, PlanError> {
        let placement = || Placement::split(self.model, &[]);
        let mut draft = wish.clone();
        let mut rung = self.rung(&draft, placement());
        for smaller in self.smaller_drafts(wish) {
            if self.is_within_share(&rung.estimate) && self.host_excess(&rung.estimate) == 0 {
                break;
            }
            draft = smaller;
            rung = self.rung(&draft, placement());
        }
        if let Some(search) = self.as_stored().filter(|_| self.host_excess(&rung.estimate) > 0) {
            return search.on_cpu(wish, is_fallback);
        }
        if self.host_excess(&rung.estimate) > 0 {
            return Err(PlanError::OutOfMemory {
                what: "system",
                used_bytes: self.host.total_bytes.saturating_sub(self.host.free_bytes),
                needed_bytes: self.host_bytes(&rung.estimate),
                limit_bytes: self.host.total_bytes,
            });
        }
        if is_fallback {
            rung.gave_up.push("no layer on any device".to_owned());
        }
        Ok(rung)
    }

    /// The rung with other settings in the same places, if that fits.
    pub(super) fn with_settings(mut self, rung: &Rung, settings: &LoadSettings) -> Option<Rung> {
        for guest in rung.guests() {
            self.reserve(guest);
        }
        let estimate = self.estimate(settings, &rung.placement);
        let is_over = self.over(&estimate).iter().any(|&bytes| bytes > 0) || self.host_excess(&estimate) > 0;
        let is_larger = estimate.host.total_bytes() > rung.estimate.host.total_bytes();
        let is_beyond_share = rung.is_cpu() && is_larger && !self.is_within_share(&estimate);
        if is_over || is_beyond_share {
            return None;
        }
        let speed = speed::predict(self.model, settings, &rung.placement, &self.devices, &self.host);
        Some(Rung { settings: settings.clone(), estimate, speed, ..rung.clone() })
    }

    /// Whether the host gives no more than Minerva takes by itself. Weights of a mapped file that are more than that already are the
    /// user's wish: then only what comes beside them counts.
    fn is_within_share(&self, estimate: &Estimate) -> bool {
        let (all, weights) = (estimate.host.total_bytes(), estimate.host.weights_bytes);
        let share = self.host.limit_bytes.saturating_sub(self.host.taken_bytes);
        let is_wish = self.host.maps_weights && weights > share;
        (if is_wish { all - weights } else { all }) <= share
    }

    fn out_of_memory(&self, needed_bytes: u64) -> PlanError {
        let limit_bytes = self.devices.iter().map(|device| device.limit_bytes).sum();
        let used = |device: &PlanDevice| device.total_bytes.saturating_sub(device.free_bytes) + device.overhead_bytes;
        PlanError::OutOfMemory {
            what: "GPU",
            used_bytes: self.devices.iter().map(used).sum(),
            needed_bytes,
            limit_bytes,
        }
    }

    /// The largest context of one sequence with the best rung's placement, by bisection.
    fn largest_context(&self, best: &Rung) -> u32 {
        let step = 256;
        let fits = |context: u32| {
            let Some(cells) = context.checked_mul(best.settings.n_sequences) else { return false };
            let settings = LoadSettings { context_tokens: cells, ..best.settings.clone() };
            let held = estimate_held(self.model, &settings, &best.placement, &self.traits(), &self.host.traits);
            let is_over =
                |taken: &Estimate| self.over(taken).iter().any(|&bytes| bytes > 0) || self.host_excess(taken) > 0;
            !is_over(&held) && !is_over(&self.estimate(&settings, &best.placement))
        };
        let (mut low, mut high) =
            (best.context_tokens / step, self.model.context_train_tokens.max(best.context_tokens) / step);
        while low < high {
            let middle = (low + high).div_ceil(2);
            if fits(middle * step) { low = middle } else { high = middle - 1 }
        }
        (low * step).max(best.context_tokens)
    }
}

/// Gives up one more thing that the user left open; says what. `None` when nothing is left.
pub(super) fn step_down(draft: &mut Draft, wishes: &Wishes, has_windows: bool) -> Option<String> {
    let settings = &mut draft.settings;
    if has_windows && settings.full_windows && wishes.full_windows.is_none() {
        settings.full_windows = false;
        draft.value *= 0.95;
        return Some("windowed layers keep their window only, so shared prompt starts are computed again".to_owned());
    }
    if wishes.ubatch_tokens.is_none() && settings.ubatch_tokens > MIN_UBATCH_TOKENS {
        settings.ubatch_tokens /= 2;
        draft.value *= 0.95;
        return Some(format!("{} tokens at once instead of {}", settings.ubatch_tokens, settings.ubatch_tokens * 2));
    }
    let open_types = wishes.cache_type_k.is_none() && wishes.cache_type_v.is_none() && settings.flash_attention;
    if wishes.may_quantise_cache && open_types && settings.cache_type_k == GgmlType::F16 {
        (settings.cache_type_k, settings.cache_type_v) = (GgmlType::Q8_0, GgmlType::Q8_0);
        draft.value *= 0.9;
        return Some("a q8_0 cache instead of f16".to_owned());
    }
    if wishes.n_cells.is_some() {
        return None;
    }
    let cells = |context: u32, n_sequences: u32| context.saturating_mul(n_sequences);
    if wishes.n_sequences.is_none() && settings.n_sequences > 1 {
        settings.n_sequences /= 2;
        settings.context_tokens = cells(draft.context_tokens, settings.n_sequences);
        draft.value *= 0.7;
        return Some(format!("{} sequences instead of {}", settings.n_sequences, settings.n_sequences * 2));
    }
    if wishes.context_tokens.is_none() && draft.context_tokens > MIN_CONTEXT_TOKENS {
        let before = draft.context_tokens;
        draft.context_tokens = (before / 2).max(MIN_CONTEXT_TOKENS);
        settings.context_tokens = cells(draft.context_tokens, settings.n_sequences);
        draft.value *= 0.7;
        return Some(format!("a context of {} tokens instead of {before}", draft.context_tokens));
    }
    None
}

/// The smallest number in the range for which there is an answer, when every larger one has an answer too.
fn first_that_fits<T>(from: u32, to: u32, mut try_number: impl FnMut(u32) -> Option<T>) -> Option<T> {
    if from > to {
        return None;
    }
    let (mut low, mut high, mut found) = (from, to, try_number(to)?);
    while low < high {
        let middle = u32::midpoint(low, high);
        match try_number(middle) {
            Some(answer) => (found, high) = (answer, middle),
            None => low = middle + 1,
        }
    }
    Some(found)
}

fn check(wishes: &Wishes) -> Result<(), PlanError> {
    let quantised = wishes.cache_type_v.filter(|ggml_type| ggml_type.block_elements() > 1);
    if let (Some(false), Some(ggml_type)) = (wishes.flash_attention, quantised) {
        let problem = format!("{} needs flash attention; without it use f32, f16 or bf16", ggml_type.name());
        return Err(PlanError::Wish { setting: "cache-type-v", problem });
    }
    Ok(())
}
