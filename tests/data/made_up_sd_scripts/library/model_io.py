def get_sai_model_spec(state_dict, args, *rest):
    return {"modelspec.prediction_type": "v" if args.v_parameterization else "epsilon"}
