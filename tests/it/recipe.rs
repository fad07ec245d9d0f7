//! Recipes: three spellings of one thing, and errors that say where.

use weightpress::budget::Budget;
use weightpress::factorize::{Factorize, Form, Method, Problem, Svd};
use weightpress::{Error, Recipe};

use super::run::matrix;

fn place(text: &str) -> ((usize, usize), String) {
    match Recipe::parse(text) {
        Err(Error::Recipe { at: Some(at), detail }) => (at, detail),
        other => panic!("{other:?}"),
    }
}

#[test]
fn typed_boxed_and_toml_methods_are_the_same_thing() {
    let text = "[[rule]]\nmatch = '.*'\nmethod = { type = 'svd', form = 'factors' }\nbudget = { rank = 3 }";
    let from_toml = Recipe::parse(text).unwrap().rules.remove(0).method;
    let typed = Svd { form: Form::Factors, ..Svd::default() };
    let boxed: Box<dyn Factorize<f32>> = Box::new(typed);
    assert_eq!(from_toml, Method::Svd(typed));
    let w = matrix(12, 9, 1);
    let group = [Problem::new("w", w.view(), Budget::Rank(3))];
    let expected = typed.factorize(&group).unwrap();
    assert_eq!(from_toml.factorize(&group).unwrap(), expected);
    assert_eq!(boxed.factorize(&group).unwrap(), expected);
}

#[test]
fn a_recipe_survives_toml() {
    let text = "seed = 7\nexclude = ['lm_head.*']\n[[rule]]\nmatch = 'a(.*)'\ngroup = '$1'\nmethod = { type = 'svd', share = 'input' }\n\
                metric = { input = 'activation', alpha = 1.0, output = 'fisher' }\nbudget = { keep = 0.25 }\n\
                allocate = { floor = 0.5, dense = false, errors = 'absolute' }\non_error = 'keep-dense'";
    let recipe = Recipe::parse(text).unwrap();
    assert_eq!(Recipe::parse(&recipe.to_toml().unwrap()).unwrap(), recipe);
}

#[test]
fn mistakes_are_shown_with_line_and_column() {
    let rule = "[[rule]]\nmatch = '.*'\nmethod = 'svd'\nbudget = { keep = 0.5 }\n";
    let (at, detail) = place(&format!("{rule}colour = 'red'"));
    assert_eq!(at, (5, 1));
    assert!(detail.contains("colour") && detail.contains("allocate"), "{detail}");
    let (at, detail) = place(&rule.replace("svd", "sdv"));
    assert_eq!(at.0, 3);
    assert!(detail.contains("sdv") && detail.contains("svd"), "{detail}");
    let (at, detail) = place(&format!("{rule}metric = 'gramm'"));
    assert_eq!(at.0, 5);
    assert!(detail.contains("gram-fisher"), "{detail}");
    let (_, detail) = place(&rule.replace("keep =", "kept ="));
    assert!(detail.contains("keep"), "{detail}");
    let (_, detail) = place(&rule.replace("'svd'", "{ type = 'svd', from = 'pivot' }"));
    assert!(detail.contains("form"), "{detail}");
    let (at, _) = place("seed = \n");
    assert_eq!(at.0, 1);
}

#[test]
fn recipes_that_make_no_sense_are_refused() {
    let rule = "[[rule]]\nmatch = '.*'\nmethod = 'svd'\nbudget = { keep = 0.5 }\n";
    for (bad, word) in [
        ("rule = []".to_owned(), "nothing to do"),
        (rule.replace("0.5", "1.5"), "keep 1.5"),
        (rule.replace("0.5", "0.0"), "keep 0"),
        (rule.replace("0.5", "nan"), "NaN"),
        (rule.replace("'.*'", "'(('"), "pattern"),
        (format!("{}allocate = 'global'", rule.replace("keep = 0.5", "rank = 3")), "keep or bytes"),
        (format!("{rule}allocate = {{ floor = 2.0 }}"), "floor"),
        (format!("{rule}metric = {{ input = 'activation', alpha = -1.0 }}"), "alpha"),
    ] {
        let error = Recipe::parse(&bad).unwrap_err();
        assert!(matches!(error, Error::Recipe { .. }) && error.to_string().contains(word), "{bad}: {error}");
    }
}

#[test]
fn methods_within_methods_may_be_names() {
    let parse = |method: &str| {
        Recipe::parse(&format!("[[rule]]\nmatch = '.*'\nmethod = {{ {method} }}\nbudget = {{ keep = 0.5 }}"))
    };
    for (names, tables) in [
        ("type = 'quantize', inner = 'svd'", "type = 'quantize', inner = { type = 'svd' }"),
        (
            "type = 'residual', first = 'two-four', then = 'quantize'",
            "type = 'residual', first = { type = 'two-four' }, then = { type = 'quantize' }",
        ),
        (
            "type = 'auto', candidates = ['svd', { type = 'quantize', bits = 4 }]",
            "type = 'auto', candidates = [{ type = 'svd' }, { type = 'quantize', bits = 4 }]",
        ),
    ] {
        let recipe = parse(names).unwrap();
        assert_eq!(recipe, parse(tables).unwrap());
        assert_eq!(Recipe::parse(&recipe.to_toml().unwrap()).unwrap(), recipe);
    }
    let wrong = parse("type = 'quantize', inner = 'sdv'").unwrap_err().to_string();
    assert!(wrong.contains("sdv") && wrong.contains("monarch"), "{wrong}");
}
