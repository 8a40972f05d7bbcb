//! What is fetched from files, for whom, and until when somebody waits for it.

use super::{Script, limits, request};
use crate::disk::file_bytes;
use crate::scheduler::{DiskOp, Fetched, OnDisk, ParkId, Policy, Scheduler};

/// Bytes of state in a file.
const STATE_BYTES: u64 = 100;

/// A scheduler of one seat that `r` has, and a file of 32 tokens for each of the names.
fn with_files(names: &str) -> Scheduler {
    let policy = Policy { host_cache_bytes: 2000, disk_cache_bytes: 1 << 20, ..Policy::default() };
    let mut scheduler = Scheduler::new(limits(1, 16), policy);
    let files = names.chars().zip(1..).map(|(name, file)| {
        let tokens = request(&name.to_string()).prompt(32).prompt;
        OnDisk { file, n_bytes: file_bytes(tokens.len(), STATE_BYTES), tokens, namespace: 0 }
    });
    scheduler.disk_found(files.collect(), vec![0]);
    scheduler.enqueue(request("r").prompt(4).priority(-9).job(), 0);
    assert!(scheduler.admit(0).is_some());
    scheduler
}

/// Asks for more than what a file has.
fn ask(name: &str) -> Script {
    request(name).prompt(34)
}

fn reads(scheduler: &mut Scheduler) -> Vec<ParkId> {
    let ops = scheduler.disk_ops().into_iter();
    ops.filter_map(|op| if let DiskOp::Read { at, .. } = op { Some(at) } else { None }).collect()
}

#[test]
fn what_lies_ready_for_those_who_wait_for_a_seat_keeps_nobody_from_his_file() {
    let mut scheduler = with_files("abcdefx");
    for name in ["a", "b", "c", "d", "e", "f"] {
        scheduler.enqueue(ask(name).job(), 0);
    }
    assert_eq!(scheduler.admit(1), None);
    let first = reads(&mut scheduler);
    assert_eq!(first.len(), 4, "so many at once");
    for at in first {
        assert!(scheduler.disk_read(at, Fetched::Done, 10));
    }
    assert_eq!(scheduler.admit(2), None);
    assert_eq!(reads(&mut scheduler).len(), 2);
    scheduler.enqueue(ask("x").priority(-1).job(), 3);
    assert_eq!(scheduler.admit(3), None);
    let own = reads(&mut scheduler);
    assert_eq!(own.len(), 1);
    assert!(scheduler.disk_read(own[0], Fetched::Done, 10));
    scheduler.release(0);
    let admission = scheduler.admit(4).expect("a seat is free");
    assert_eq!((admission.id, admission.n_cached), (u64::from(b'x'), 32));
}

#[test]
fn no_more_than_half_of_host_memory_is_kept_for_those_who_wait_for_a_seat() {
    let names: String = ('a'..='q').collect();
    let mut scheduler = with_files(&names);
    for name in names.chars() {
        scheduler.enqueue(ask(&name.to_string()).job(), 0);
    }
    let mut n_read = 0;
    for now_us in 1..20 {
        assert_eq!(scheduler.admit(now_us), None);
        for at in reads(&mut scheduler) {
            n_read += 1;
            assert!(scheduler.disk_read(at, Fetched::Done, 10));
        }
    }
    assert_eq!((n_read, scheduler.parked_bytes()), (10, 1000));
}

#[test]
fn after_a_file_could_not_be_read_none_is_for_a_while_and_then_it_is_again() {
    let mut scheduler = with_files("ab");
    let second = 1_000_000;
    scheduler.enqueue(ask("a").job(), 0);
    assert_eq!(scheduler.admit(1), None);
    let at = reads(&mut scheduler)[0];
    assert!(scheduler.disk_read(at, Fetched::NotNow, 10));
    assert_eq!(scheduler.dropped(), vec![at]);
    scheduler.release(0);
    let admission = scheduler.admit(2).expect("nobody waits for what is not read");
    assert_eq!((admission.id, admission.n_cached), (u64::from(b'a'), 0));
    scheduler.enqueue(ask("b").priority(1).job(), second);
    assert_eq!(scheduler.admit(second), None);
    assert_eq!(reads(&mut scheduler), Vec::<ParkId>::new(), "too early");
    assert_eq!(scheduler.admit(6 * second), None);
    let at = reads(&mut scheduler)[0];
    assert!(scheduler.disk_read(at, Fetched::Done, 10));
    scheduler.discard(0);
    scheduler.release(0);
    assert_eq!(scheduler.admit(6 * second).map(|admission| admission.n_cached), Some(32));
    assert_eq!(scheduler.on_disk().1, 2, "the other file is there still");
}

#[test]
fn a_deadline_is_not_slept_through_while_a_file_is_read() {
    let mut scheduler = with_files("a");
    scheduler.release(0);
    let mut hurried = ask("a");
    hurried.terms.deadline_us = Some(90_000);
    scheduler.enqueue(hurried.job(), 0);
    assert_eq!(scheduler.admit(1), None);
    assert_eq!(reads(&mut scheduler).len(), 1);
    assert_eq!(scheduler.waits_until_us(1), Some(90_000));
    assert_eq!(scheduler.expired(90_000), vec![u64::from(b'a')]);
}
