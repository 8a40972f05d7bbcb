//! Which layers lie on which device.

use super::model::ModelShape;

/// Places of a model's layers, its output, and of experts that stay behind. Devices are counted from 0; the host comes after
/// the last of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    n_devices: usize,
    layers: Vec<usize>,
    output: usize,
    experts_on_host: Vec<bool>,
}

impl Placement {
    /// The last `layers_per_device.sum()` layers on devices, in their order; the output layer is the last of them.
    ///
    /// As llama.cpp's `n_gpu_layers` and `tensor_split` place them.
    pub fn split(model: &ModelShape, layers_per_device: &[u32]) -> Self {
        let n_devices = layers_per_device.len();
        let n_all = model.n_layers_all as usize + 1;
        let mut places = vec![n_devices; n_all];
        let n_placed = layers_per_device.iter().map(|&n| n as usize).sum::<usize>().min(n_all);
        let devices =
            layers_per_device.iter().enumerate().flat_map(|(device, &n)| std::iter::repeat_n(device, n as usize));
        for (place, device) in places[n_all - n_placed..].iter_mut().zip(devices) {
            *place = device;
        }
        let output = places.pop().unwrap_or(n_devices);
        Self { n_devices, layers: places, output, experts_on_host: vec![false; model.n_layers_all as usize] }
    }

    /// Leaves the experts of these layers on the host, wherever the rest of the layer is.
    #[must_use]
    pub fn with_experts_on_host(mut self, layers: impl IntoIterator<Item = u32>) -> Self {
        for il in layers {
            if let Some(stays) = self.experts_on_host.get_mut(il as usize) {
                *stays = true;
            }
        }
        self
    }

    /// Devices, without the host.
    pub fn n_devices(&self) -> usize {
        self.n_devices
    }

    /// Layers on devices, the output layer included: llama.cpp's `n_gpu_layers`.
    pub fn n_gpu_layers(&self) -> u32 {
        let on_device = |place: &&usize| **place < self.n_devices;
        u32::try_from(self.layers.iter().chain([&self.output]).filter(on_device).count()).unwrap_or(u32::MAX)
    }

    /// Layers that could be on devices: the model's and the output layer.
    pub fn n_layers_total(&self) -> u32 {
        u32::try_from(self.layers.len() + 1).unwrap_or(u32::MAX)
    }

    /// Layers on each device, the output layer included: the weights of llama.cpp's `tensor_split`.
    pub fn layers_per_device(&self) -> Vec<u32> {
        let mut counts = vec![0; self.n_devices];
        for &place in self.layers.iter().chain([&self.output]) {
            if let Some(count) = counts.get_mut(place) {
                *count += 1;
            }
        }
        counts
    }

    /// Layers whose experts stay on the host although the layer does not.
    pub fn expert_layers_on_host(&self) -> Vec<u32> {
        (0..).zip(&self.experts_on_host).filter(|(_, stays)| **stays).map(|(il, _)| il).collect()
    }

    /// Everything on devices, so that llama.cpp pins each layer's norms too.
    pub(super) fn is_full_offload(&self) -> bool {
        self.n_gpu_layers() as usize == self.layers.len() + 1
    }

    /// The device of a layer; `None` is the host.
    pub(crate) fn device_of(&self, il: u32) -> Option<usize> {
        Some(self.layer_backend(il)).filter(|&place| place < self.n_devices)
    }

    pub(super) fn layer_backend(&self, il: u32) -> usize {
        self.layers.get(il as usize).copied().unwrap_or(self.n_devices)
    }

    pub(super) fn output_backend(&self) -> usize {
        self.output
    }

    /// Where a tensor of a layer lies; `name` is what follows `blk.N.`.
    pub(super) fn tensor_backend(&self, il: u32, name: &str) -> usize {
        if is_expert(name) && self.experts_on_host.get(il as usize).copied().unwrap_or(false) {
            return self.n_devices;
        }
        self.layer_backend(il)
    }

    /// Where a tensor outside the layers lies: the output's beside it, the rest on the host.
    pub(super) fn outside_backend(&self, name: &str) -> usize {
        let is_output = ["output", "cls", "rope_"].iter().any(|prefix| name.starts_with(prefix));
        if is_output { self.output } else { self.n_devices }
    }
}

/// Whether a tensor holds one matrix per expert.
pub(super) fn is_expert(name: &str) -> bool {
    name.contains("_exps.") || name.contains("_chexps.")
}
