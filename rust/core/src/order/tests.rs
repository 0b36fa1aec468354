use super::*;
use proptest::prelude::*;

fn mixture(shares: Option<Vec<f64>>, by: MixBy, stopping: Stopping) -> Mixture {
    Mixture { shares, by, stopping }
}

fn whole() -> Mixture {
    mixture(None, MixBy::Rows, Stopping::FirstExhausted)
}

proptest! {
    #[test]
    fn a_permutation_hits_each_number_once(count in 1_u32..3000, key in any::<u64>()) {
        let permutation = Permutation::new(count, key);
        let mut hit: Vec<u32> = (0..count).map(|position| permutation.at(position)).collect();
        hit.sort_unstable();
        prop_assert!(hit.into_iter().eq(0..count));
    }

    #[test]
    fn an_epoch_without_shares_is_every_row_once(
        sizes in prop::collection::vec(1_u32..200, 1..5), seed in any::<u64>(), is_shuffled in any::<bool>(),
    ) {
        let sets: Vec<Rows> = sizes.iter().scan(0, |start, size| {
            let rows = Rows::Range(*start, *start + size);
            *start += size;
            Some(rows)
        }).collect();
        let order = EpochOrder::new(&sets, &whole(), is_shuffled, seed, 2, &|_| 1).unwrap();
        let mut rows: Vec<u32> = (0..order.len()).map(|position| order.at(position)).collect();
        rows.sort_unstable();
        prop_assert!(rows.into_iter().eq(0..sizes.iter().sum()));
    }
}

#[test]
fn places_are_uniform_over_keys() {
    // 5 rows, 20,000 keys: each row is at each place 4,000 times give or take 5 standard deviations
    let mut counts = [[0_i32; 5]; 5];
    for number in 0..20_000 {
        let permutation = Permutation::new(5, key(number, 0, 0));
        for position in 0..5 {
            counts[position as usize][permutation.at(position) as usize] += 1;
        }
    }
    assert!(counts.iter().flatten().all(|count| (count - 4000).abs() < 285), "{counts:?}");
}

#[test]
fn first_exhausted_uses_up_one_set_and_repeats_nothing() {
    let sets = [Rows::Range(0, 100), Rows::Range(100, 1100)];
    let mix = mixture(Some(vec![0.5, 0.5]), MixBy::Rows, Stopping::FirstExhausted);
    let mut seen = std::collections::HashSet::new();
    for epoch in 0..10 {
        let order = EpochOrder::new(&sets, &mix, true, 1, epoch, &|_| 1).unwrap();
        let rows: std::collections::HashSet<u32> = (0..order.len()).map(|at| order.at(at)).collect();
        assert_eq!(rows.len(), 200);
        assert_eq!(rows.iter().filter(|&&row| row < 100).count(), 100);
        seen.extend(rows);
    }
    // ten epochs take turns through the larger set, so each of its rows was used
    assert_eq!(seen.len(), 1100);
}

#[test]
fn all_exhausted_repeats_the_smaller_set_evenly() {
    let sets = [Rows::Range(0, 100), Rows::Range(100, 1100)];
    let mix = mixture(Some(vec![0.3, 0.7]), MixBy::Rows, Stopping::AllExhausted);
    let mut times = vec![0; 1100];
    for epoch in 0..5 {
        let order = EpochOrder::new(&sets, &mix, true, 1, epoch, &|_| 1).unwrap();
        assert_eq!(order.of_set(0).count(), 429);
        (0..order.len()).for_each(|at| times[order.at(at) as usize] += 1);
    }
    assert!(times[100..].iter().all(|&count| count == 5));
    // 5 · 429 rows are 21 whole passes and a part of one
    assert!(times[..100].iter().all(|&count| (21..=22).contains(&count)));
}

#[test]
fn shares_in_trained_tokens_are_met_within_a_row() {
    let sets = [Rows::Range(0, 1000), Rows::Range(1000, 3000)];
    let trained = |row: u32| if row < 1000 { 10 + row % 91 } else { 5 + row % 7 };
    let mix = mixture(Some(vec![0.7, 0.3]), MixBy::Tokens, Stopping::FirstExhausted);
    for epoch in 0..4 {
        let order = EpochOrder::new(&sets, &mix, true, 1, epoch, &trained).unwrap();
        let tokens = |set| order.of_set(set).map(|row| f64::from(trained(row))).sum::<f64>();
        let share = tokens(0) / (tokens(0) + tokens(1));
        assert!((share - 0.7).abs() < 0.002, "{share}");
    }
}

#[test]
fn sequential_mixes_spread_each_set_over_the_epoch() {
    let sets = [Rows::Range(0, 10), Rows::Range(10, 40)];
    let mix = mixture(Some(vec![0.25, 0.75]), MixBy::Rows, Stopping::FirstExhausted);
    let order = EpochOrder::new(&sets, &mix, false, 1, 0, &|_| 1).unwrap();
    for start in (0..order.len()).step_by(4) {
        let first = (start..start + 4).filter(|&at| order.at(at) < 10).count();
        assert_eq!(first, 1);
    }
}

#[test]
fn a_row_stays_on_its_side_when_rows_are_appended() {
    let hash = |row: u32| key(u64::from(row), 0, 0);
    let sides = |count| split(&[Rows::Range(0, count)], 0.1, 7, hash).1[0].iter().collect::<Vec<_>>();
    let (before, after) = (sides(900), sides(1000));
    assert!((60..120).contains(&before.len()), "{}", before.len());
    assert_eq!(before, after.into_iter().filter(|&row| row < 900).collect::<Vec<_>>());
}

#[test]
fn a_split_has_both_sides_and_every_row_once() {
    for (count, ratio) in [(2, 0.000_001), (2, 0.999_999), (97, 0.1), (3, 0.5)] {
        let sets = [Rows::Range(0, 1), Rows::Range(1, count)];
        let (train, held) = split(&sets, ratio, 3, |row| key(u64::from(row), 1, 1));
        let mut all: Vec<u32> = train.iter().chain(&held).flat_map(Rows::iter).collect();
        all.sort_unstable();
        assert!(all.into_iter().eq(0..count));
        assert!(held.iter().any(|rows| !rows.is_empty()) && train.iter().any(|rows| !rows.is_empty()));
    }
    let (train, held) = split(&[Rows::Range(0, 1)], 0.5, 3, |_| 0);
    assert_eq!((train[0].len(), held[0].len()), (1, 0));
}

#[test]
fn wrong_shares_are_refused() {
    let sets = [Rows::Range(0, 10), Rows::Range(10, 40)];
    for shares in [vec![0.5], vec![0.5, 0.0], vec![0.5, f64::NAN]] {
        let mix = mixture(Some(shares), MixBy::Rows, Stopping::FirstExhausted);
        assert!(EpochOrder::new(&sets, &mix, true, 1, 0, &|_| 1).is_err());
    }
}
