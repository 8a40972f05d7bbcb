//! The plan as people read it.

use std::fmt;

use super::{DraftLoad, Plan, Rung};
use crate::estimate::{DeviceLoad, Estimate};
use crate::memory::format_bytes;

/// Characters of a bar.
const BAR_WIDTH: u64 = 24;

impl fmt::Display for Plan {
    /// A table per device with bars, what was given up, the rungs below, and the largest context.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let best = self.best();
        let settings = &best.settings;
        writeln!(
            f,
            "{} of {} layers on devices, {} sequences of {} tokens, ubatch {}, cache {}/{}, flash attention {}",
            best.placement.n_gpu_layers(),
            best.placement.n_layers_total(),
            settings.n_sequences,
            best.context_tokens,
            settings.ubatch_tokens,
            settings.cache_type_k.name(),
            settings.cache_type_v.name(),
            if settings.flash_attention { "on" } else { "off" },
        )?;
        writeln!(f)?;
        writeln!(
            f,
            "{:<28} {:>6} {:>11} {:>11} {:>11} {:>11}  used of its room",
            "", "layers", "weights", "cache", "scratch", "sum"
        )?;
        let layers = best.placement.layers_per_device();
        for (at, ((device, load), n_layers)) in self.devices.iter().zip(&best.estimate.devices).zip(layers).enumerate()
        {
            let room = device.open_bytes();
            row(f, &device.name, Some(n_layers), load, device.overhead_bytes, room)?;
            let mut before = load.total_bytes().saturating_add(device.overhead_bytes);
            for (name, n_layers, load) in beside(best, Some(at)) {
                row(f, name, n_layers, &load, before, room)?;
                before = before.saturating_add(load.total_bytes());
            }
        }
        let n_on_host = best.placement.n_layers_total() - best.placement.n_gpu_layers();
        row(f, "host", Some(n_on_host), &best.estimate.host, 0, self.host.free_bytes)?;
        let mut before = best.estimate.host.total_bytes();
        for (name, n_layers, load) in beside(best, None) {
            row(f, name, n_layers, &load, before, self.host.free_bytes)?;
            before = before.saturating_add(load.total_bytes());
        }
        let experts = best.placement.expert_layers_on_host();
        if !experts.is_empty() {
            writeln!(f, "the experts of {} layers are on the host", experts.len())?;
        }
        writeln!(f)?;
        writeln!(
            f,
            "about {} tokens per second for one sequence, {:.0} % of the time on the host",
            rate(best.speed.decode_tokens_per_second),
            100.0 * best.speed.host_share
        )?;
        writeln!(f, "the largest context that fits is {} tokens a sequence", self.largest_context_tokens)?;
        for gave_up in &best.gave_up {
            writeln!(f, "given up: {gave_up}")?;
        }
        if self.rungs.len() > 1 {
            writeln!(f, "\nif a load fails, in this order:")?;
            for rung in &self.rungs[1..] {
                writeln!(f, "  {rung}")?;
            }
        }
        Ok(())
    }
}

/// Rows below what the main model takes on a device, or on the host; each sum is that of all above it. A projector has no layers of
/// the model's.
fn beside(rung: &Rung, device: Option<usize>) -> impl Iterator<Item = (&'static str, Option<u32>, DeviceLoad)> {
    let on = |at: Option<usize>, estimate: &Estimate| match device {
        None => Some(estimate.host),
        Some(_) => estimate.devices.first().copied().filter(|_| at == device),
    };
    let draft = rung.draft.as_ref().and_then(|draft| {
        let (all, there) = (draft.placement.n_layers_total(), draft.placement.n_gpu_layers());
        let n_layers = if device.is_some() { there } else { all - there };
        let name = if draft.is_head { "  and the head" } else { "  and the draft model" };
        let n_layers = (!draft.is_head).then_some(n_layers);
        Some((name, n_layers, on(draft.device, &draft.estimate)?))
    });
    let projector = rung.projector.as_ref();
    let projector = projector.and_then(|load| Some(("  and the projector", None, on(load.device, &load.estimate)?)));
    draft.into_iter().chain(projector)
}

fn row(
    f: &mut fmt::Formatter<'_>,
    name: &str,
    n_layers: Option<u32>,
    load: &DeviceLoad,
    overhead_bytes: u64,
    room_bytes: u64,
) -> fmt::Result {
    let used = load.total_bytes().saturating_add(overhead_bytes);
    let n_layers = n_layers.map_or_else(String::new, |n| n.to_string());
    let [weights, cache, scratch, sum] =
        [load.weights_bytes, load.cache_bytes, load.compute_bytes, used].map(format_bytes);
    let percent = used.saturating_mul(100).checked_div(room_bytes).unwrap_or(0);
    let filled = used.saturating_mul(BAR_WIDTH).checked_div(room_bytes).unwrap_or(0).min(BAR_WIDTH) as usize;
    let bar = format!("{}{}", "#".repeat(filled), ".".repeat(BAR_WIDTH as usize - filled));
    writeln!(f, "{name:<28} {n_layers:>6} {weights:>11} {cache:>11} {scratch:>11} {sum:>11}  [{bar}] {percent} %")
}

impl fmt::Display for Rung {
    /// One line: what runs where, and how fast.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let layers = self.placement.n_gpu_layers();
        let on_devices: u64 = (0..self.estimate.devices.len()).map(|at| self.device_bytes(at)).sum();
        if self.is_cpu() {
            write!(f, "CPU: {} of RAM", format_bytes(self.host_bytes()))?;
        } else {
            write!(f, "{layers} layers on devices: {}", format_bytes(on_devices))?;
        }
        let draft = self.draft.as_ref().map(DraftLoad::name);
        let on_device = self.projector.as_ref().filter(|projector| projector.device.is_some());
        match (draft, on_device.map(|_| "the projector")) {
            (Some(draft), Some(projector)) => write!(f, " with {draft} and {projector}")?,
            (Some(name), None) | (None, Some(name)) => write!(f, " with {name}")?,
            (None, None) => {}
        }
        let n_experts = self.placement.expert_layers_on_host().len();
        if n_experts > 0 && !self.is_cpu() {
            write!(f, ", the experts of {n_experts} layers on the host")?;
        }
        write!(
            f,
            ", {} sequences of {} tokens, ubatch {}, about {} tokens per second",
            self.settings.n_sequences,
            self.context_tokens,
            self.settings.ubatch_tokens,
            rate(self.speed.decode_tokens_per_second)
        )
    }
}

/// Two digits are all that a prediction has.
fn rate(tokens_per_second: f64) -> String {
    if tokens_per_second < 10.0 { format!("{tokens_per_second:.1}") } else { format!("{tokens_per_second:.0}") }
}
