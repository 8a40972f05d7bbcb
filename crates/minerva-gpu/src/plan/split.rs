//! Layers over several devices.

use crate::estimate::Placement;

/// Rounds of moving layers from devices that turn out too full.
const MAX_ROUNDS: usize = 8;

/// Shares out consecutive layers of these sizes so that no device is too full.
///
/// In proportion to the room on each device, and then corrected: `over` answers by how many bytes each device is too full, and
/// `place` makes a placement of a number of layers for each device. `None` when the layers do not fit.
pub(super) fn share_out(
    sizes: &[u64],
    room_bytes: &[u64],
    place: impl Fn(&[u32]) -> Placement,
    mut over: impl FnMut(&Placement) -> Vec<u64>,
) -> Option<Placement> {
    let n_layers = sizes.len() as u64;
    let mut room = room_bytes.to_vec();
    let mut tried: Vec<Vec<u32>> = Vec::new();
    for _ in 0..MAX_ROUNDS {
        let counts = in_proportion(sizes, &room);
        if tried.contains(&counts) {
            return None;
        }
        let placement = place(&counts);
        let excess = over(&placement);
        if excess.iter().all(|&bytes| bytes == 0) {
            return Some(placement);
        }
        if room.len() < 2 {
            return None;
        }
        let smallest = sizes.iter().copied().min().unwrap_or(1).max(1);
        for (room, (excess, count)) in room.iter_mut().zip(excess.iter().zip(&counts)) {
            if *excess > 0 {
                let held: u64 = sizes.iter().sum::<u64>() * u64::from(*count) / n_layers.max(1);
                *room = (*room).min(held).saturating_sub((*excess).max(smallest));
            }
        }
        tried.push(counts);
    }
    None
}

/// Counts of consecutive layers whose bytes follow the shares of `room`.
fn in_proportion(sizes: &[u64], room: &[u64]) -> Vec<u32> {
    let total: u128 = sizes.iter().map(|&bytes| u128::from(bytes)).sum();
    let all_room: u128 = room.iter().map(|&bytes| u128::from(bytes)).sum::<u128>().max(1);
    let mut counts = vec![0; room.len()];
    let (mut device, mut border, mut so_far) = (0, 0, 0);
    for &bytes in sizes {
        so_far += u128::from(bytes);
        // A layer belongs to the device in whose share its middle lies.
        let middle = so_far - u128::from(bytes) / 2;
        while device + 1 < room.len() && middle * all_room > (border + u128::from(room[device])) * total {
            border += u128::from(room[device]);
            device += 1;
        }
        counts[device] += 1;
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_follow_the_room() {
        assert_eq!(in_proportion(&[1; 12], &[24, 8]), [9, 3]);
        assert_eq!(in_proportion(&[1; 10], &[10]), [10]);
        assert_eq!(in_proportion(&[1; 4], &[0, 4]), [0, 4]);
        assert_eq!(in_proportion(&[2, 2, 2, 6], &[6, 6]), [3, 1]);
        assert_eq!(in_proportion(&[], &[1, 2]), [0, 0]);
    }
}
