//! Many tasks in flight, results in order, memory bounded.
//!
//! [`Ordered`] runs one function over a sequence of tasks on several threads and gives the results in the order of
//! the tasks, never more than `ahead` of the reader. The output does not depend on the number of threads.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::{Error, ErrorKind};

/// How long a wait lasts before the caller may look round (for Ctrl-C).
pub const PATIENCE: Duration = Duration::from_millis(50);
/// How long workers that are stopped are waited for.
const GRACE: Duration = Duration::from_millis(500);
/// A look at them.
const LOOK_EVERY: Duration = Duration::from_millis(1);

/// What [`Ordered::next`] found.
#[derive(Debug)]
pub enum Next<T> {
    /// The next result.
    Item(T),
    /// All tasks are done.
    End,
    /// Nothing yet; ask again.
    Pending,
    /// A worker panicked; nothing more will come.
    Failed,
}

struct State<T> {
    /// Results that are ready, by task number.
    ready: BTreeMap<usize, T>,
    /// The number of the task that is claimed next.
    next_task: usize,
    /// The number of the result that is read next.
    next_result: usize,
    /// The number of tasks, once their end was seen.
    num_tasks: Option<usize>,
    /// The reader has gone.
    stopped: bool,
    /// A worker panicked.
    failed: bool,
}

struct Shared<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
}

impl<T> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        // no user code runs under the lock, so a poisoned state is still whole
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Results of tasks run on several threads, in the order of the tasks.
pub struct Ordered<T> {
    shared: Arc<Shared<T>>,
    workers: Vec<JoinHandle<()>>,
    /// The process that started the workers; a forked child has the handles but not the threads.
    process: u32,
}

/// Tells the reader when its thread dies of a panic.
struct PanicGuard<T>(Arc<Shared<T>>);

impl<T> Drop for PanicGuard<T> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.lock().failed = true;
            self.0.changed.notify_all();
        }
    }
}

impl<T: Send + 'static> Ordered<T> {
    /// Starts `num_threads` workers that run `work` on each of `tasks`, at most `ahead` results before the reader.
    pub fn start<Task: Send + 'static>(
        tasks: impl Iterator<Item = Task> + Send + 'static,
        num_threads: usize,
        ahead: usize,
        work: impl Fn(Task) -> T + Send + Sync + 'static,
    ) -> Self {
        let state = State {
            ready: BTreeMap::new(),
            next_task: 0,
            next_result: 0,
            num_tasks: None,
            stopped: false,
            failed: false,
        };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let tasks = Arc::new(Mutex::new(tasks));
        let work = Arc::new(work);
        let workers = (0..num_threads.max(1))
            .map(|_| {
                let (shared, tasks, work) = (shared.clone(), tasks.clone(), work.clone());
                std::thread::spawn(move || {
                    let guard = PanicGuard(shared);
                    while let Some((number, task)) = claim(&guard.0, &tasks, ahead.max(1)) {
                        let result = work(task);
                        guard.0.lock().ready.insert(number, result);
                        guard.0.changed.notify_all();
                    }
                })
            })
            .collect();
        Self { shared, workers, process: std::process::id() }
    }

    /// The next result in order, waiting at most `timeout` for it.
    pub fn next(&mut self, timeout: Duration) -> Next<T> {
        let mut state = self.shared.lock();
        let mut waited = false;
        loop {
            let number = state.next_result;
            if let Some(result) = state.ready.remove(&number) {
                state.next_result += 1;
                self.shared.changed.notify_all();
                return Next::Item(result);
            }
            if state.failed {
                return Next::Failed;
            }
            if state.num_tasks == Some(number) {
                return Next::End;
            }
            if waited {
                return Next::Pending;
            }
            let (next, timed_out) =
                self.shared.changed.wait_timeout(state, timeout).unwrap_or_else(PoisonError::into_inner);
            state = next;
            waited = timed_out.timed_out();
        }
    }
}

/// The next task and its number, once the reader is close enough; `None` when there is no more to do.
fn claim<T, Task>(
    shared: &Shared<T>,
    tasks: &Mutex<impl Iterator<Item = Task>>,
    ahead: usize,
) -> Option<(usize, Task)> {
    // tasks are drawn one at a time and numbered as they are drawn
    let mut tasks = tasks.lock().unwrap_or_else(PoisonError::into_inner);
    let mut state = shared.lock();
    while !state.stopped && state.num_tasks.is_none() && state.next_task >= state.next_result + ahead {
        state = shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
    }
    if state.stopped || state.failed || state.num_tasks.is_some() {
        return None;
    }
    drop(state);
    let task = tasks.next();
    let mut state = shared.lock();
    let number = state.next_task;
    if let Some(task) = task {
        state.next_task += 1;
        return Some((number, task));
    }
    state.num_tasks = Some(number);
    drop(state);
    shared.changed.notify_all();
    None
}

impl<T> Drop for Ordered<T> {
    fn drop(&mut self) {
        if std::process::id() != self.process {
            // nothing to stop or to wait for, and the lock may have been held at the fork
            std::mem::forget(std::mem::take(&mut self.workers));
            return;
        }
        self.shared.lock().stopped = true;
        self.shared.changed.notify_all();
        let begun = Instant::now();
        for worker in self.workers.drain(..) {
            while !worker.is_finished() && begun.elapsed() < GRACE {
                std::thread::sleep(LOOK_EVERY);
            }
            if worker.is_finished() {
                // a panic was already reported through `failed`
                let _ = worker.join();
            }
            // else it waits for a pipe that says nothing, and ends by itself when that does
        }
    }
}

/// The error for a worker that panicked: a defect of sftcore, not of the data.
pub fn worker_panicked() -> Error {
    Error::new(
        ErrorKind::Io(std::io::ErrorKind::Other),
        "a data thread panicked; please report this with its output",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drain<T: Send + 'static>(mut ordered: Ordered<T>) -> Option<Vec<T>> {
        let mut results = Vec::new();
        loop {
            match ordered.next(PATIENCE) {
                Next::Item(result) => results.push(result),
                Next::End => return Some(results),
                Next::Pending => {}
                Next::Failed => return None,
            }
        }
    }

    #[test]
    fn results_come_in_order_for_any_number_of_threads() {
        for num_threads in [1, 2, 8] {
            for ahead in [1, 3, 100] {
                let ordered = Ordered::start(0..500, num_threads, ahead, |task: u32| task * 2);
                assert_eq!(drain(ordered), Some((0..500).map(|task| task * 2).collect()));
            }
        }
    }

    #[test]
    fn a_worker_that_panics_ends_the_sequence_instead_of_hanging_it() {
        let ordered = Ordered::start(0..50, 2, 4, |task: u32| assert_ne!(task, 20));
        assert_eq!(drain(ordered), None);
    }

    #[test]
    fn dropping_the_reader_stops_the_workers() {
        let mut ordered = Ordered::start(0_u64.., 3, 4, |task| task);
        assert!(matches!(ordered.next(Duration::from_secs(5)), Next::Item(0)));
        drop(ordered);
    }

    #[test]
    fn a_worker_that_waits_for_ever_does_not_hold_up_the_reader() {
        let (sender, receiver) = std::sync::mpsc::channel::<u32>();
        let mut ordered = Ordered::start(receiver.into_iter(), 2, 4, |task| task);
        assert!(matches!(ordered.next(PATIENCE), Next::Pending));
        let begun = Instant::now();
        drop(ordered);
        assert!(begun.elapsed() < 4 * GRACE);
        drop(sender);
    }
}
